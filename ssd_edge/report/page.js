"use strict";
/* Only adds to the page: looks up cells of the confusion matrix, and sorts and searches the classes. */
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const count = data.classes.length;
  const [matrix, cell, shown] = [at("matrix"), at("cell"), at("shown")];
  const names = document.querySelector(".names");
  let order = data.orders.alike;
  let here = [0, 0]; /* row and column on the page */

  document.querySelectorAll(".needs-script").forEach((part) => { part.hidden = false; });

  function sentence(truth, given) {
    const tested = data.tested[truth], wrong = data.cells[truth + "," + given];
    if (!tested) return data.classes[truth] + " has no test images.";
    if (truth === given) {
      const misses = Object.entries(data.cells)
        .reduce((sum, [key, [n]]) => sum + (Number(key.split(",")[0]) === truth ? n : 0), 0);
      return `${data.classes[truth]}: ${tested - misses} of ${tested} test images are named correctly.`;
    }
    return `${data.classes[truth]}: ${wrong ? wrong[0] : 0} of ${tested} test images are called ${data.classes[given]}.`;
  }

  function place(row, column) {
    here = [row, column].map((value) => Math.max(0, Math.min(count - 1, value)));
    at("row").setAttribute("y", here[0]);
    at("column").setAttribute("x", here[1]);
    at("row").setAttribute("visibility", "visible");
    at("column").setAttribute("visibility", "visible");
    cell.textContent = sentence(order[here[0]], order[here[1]]);
  }

  function photograph(index) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg"), use = document.createElementNS(space, "use");
    svg.setAttribute("viewBox", "0 0 112 112");
    svg.setAttribute("class", "photo");
    use.setAttribute("href", "#p" + index);
    svg.append(use);
    return svg;
  }

  function strip(heading, indices) {
    const part = document.createElement("div"), title = document.createElement("h4"), row = document.createElement("div");
    title.textContent = heading;
    row.className = "strip";
    row.append(...indices.map(photograph));
    part.append(title, row);
    return indices.length ? [part] : [];
  }

  function open() {
    const [truth, given] = here.map((position) => order[position]);
    const wrong = data.cells[truth + "," + given];
    const parts = strip(data.classes[truth], data.examples[truth]);
    if (truth !== given) {
      parts.push(...strip(data.classes[given], data.examples[given]));
      const some = wrong && wrong[1].length < wrong[0] ? ` (${wrong[1].length} of ${wrong[0]})` : "";
      if (wrong) parts.push(...strip(`${data.classes[truth]}, called ${data.classes[given]}${some}`, wrong[1]));
    }
    shown.replaceChildren(...parts);
  }

  function pointed(event) {
    const box = matrix.getBoundingClientRect();
    place(Math.floor(((event.clientY - box.top) / box.height) * count),
      Math.floor(((event.clientX - box.left) / box.width) * count));
  }

  matrix.addEventListener("pointermove", pointed);
  matrix.addEventListener("click", (event) => { pointed(event); open(); });
  matrix.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (move) place(here[0] + move[0], here[1] + move[1]);
    else if (event.key === "Enter" || event.key === " ") open();
    else return;
    event.preventDefault();
  });

  at("order").addEventListener("change", (event) => {
    order = data.orders[event.target.value];
    const places = [];
    order.forEach((row, position) => { places[row] = position; });
    matrix.querySelectorAll("[data-at]").forEach((rect) => {
      const [truth, given] = rect.dataset.at.split(",");
      rect.setAttribute("y", places[truth]);
      rect.setAttribute("x", places[given]);
    });
    if (names) names.querySelectorAll("li").forEach((item, position) => { item.textContent = data.classes[order[position]]; });
    place(...here);
  });

  const list = at("list"), items = [...list.children];
  at("find").addEventListener("input", (event) => {
    const wanted = event.target.value.toLocaleLowerCase();
    items.forEach((item) => { item.hidden = !item.dataset.name.toLocaleLowerCase().includes(wanted); });
  });
  at("sort").addEventListener("change", (event) => {
    const key = event.target.value;
    items.sort((a, b) => (key === "name" ? 0 : a.dataset[key] - b.dataset[key])
      || a.dataset.name.localeCompare(b.dataset.name));
    list.append(...items);
  });

  function follow() { /* a link to something folded opens it */
    const target = at(location.hash.slice(1));
    const folded = target && target.closest("details");
    if (folded) {
      folded.open = true;
      target.scrollIntoView();
    }
  }
  addEventListener("hashchange", follow);
  follow();
})();
