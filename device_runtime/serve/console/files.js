// Files and folders from the file dialog and from drag and drop, as groups of pictures: one group for each folder.

const PICTURE = /\.(jpe?g|png|webp|bmp|gif|tiff?|heic|heif)$/i;

const isPicture = (file) => !file.name.startsWith(".") && (file.type.startsWith("image/") || PICTURE.test(file.name));

/** Return {folder: files} of the pictures in a list of files; the folder of a single file is "". */
export function grouped(files, folderOf = (file) => (file.webkitRelativePath ?? "").split("/").slice(0, -1)) {
  const groups = new Map();
  for (const file of [...files].filter(isPicture)) {
    const folder = folderOf(file).at(-1) ?? "";
    groups.set(folder, [...(groups.get(folder) ?? []), file]);
  }
  return Object.fromEntries(groups);
}

/** Return {folder: files} of what was dropped; folders are read with all that is in them. */
export async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return grouped(transfer.files);
  const found = new Map(); // file → its folders
  for (const entry of entries) await walk(entry, [], found);
  return grouped(found.keys(), (file) => found.get(file));
}

async function walk(entry, folders, found) {
  if (entry.isFile) {
    found.set(await new Promise((done, failed) => entry.file(done, failed)), folders);
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((done, failed) => reader.readEntries(done, failed)); // at most 100 at a time
    if (!some.length) return;
    for (const child of some) await walk(child, [...folders, entry.name], found);
  }
}
