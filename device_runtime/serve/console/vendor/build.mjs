// Bundle Preact, its hooks and htm into one module, with their licences. `make console` runs it where npm has put them.
import { build } from "esbuild";
import { readFileSync } from "node:fs";

const name = (part) => {
  const { version, homepage } = JSON.parse(readFileSync(`node_modules/${part}/package.json`, "utf8"));
  return `${part} ${version}${homepage ? `, ${homepage}` : ""}`;
};
const banner = [
  "/*! Made by `make console`; do not edit.",
  name("preact"),
  readFileSync("node_modules/preact/LICENSE", "utf8").trim(),
  `${name("htm")}: Copyright 2018 Google Inc., Apache License 2.0 (http://www.apache.org/licenses/LICENSE-2.0)`,
  "*/",
].join("\n\n");

await build({
  stdin: {
    contents: [
      'export { Component, createContext, h, render } from "preact";',
      'export { useCallback, useContext, useEffect, useId, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";',
      'import htm from "htm"; import { h } from "preact"; export const html = htm.bind(h);',
    ].join("\n"),
    resolveDir: ".",
  },
  banner: { js: banner },
  bundle: true,
  format: "esm",
  legalComments: "none",
  minify: true,
  outfile: "vendor.js",
  target: "es2022",
});
