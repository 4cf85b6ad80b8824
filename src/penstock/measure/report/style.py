"""How a page looks, and the script that sorts its tables. No element carries a style of its own.

The colours of series are told apart by people who see red and green alike; series differ in shape
and dashes too.
"""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #5a5a5a; --line: #d4d4d4;
  --back: #ffffff; --raised: #f5f5f3; --bad: #b3261e; --badback: #fdecea;
  --c0: #0072b2; --c1: #d55e00; --c2: #00845f; --c3: #a5508c; --c4: #946200; --c5: #2b8cc4;
  --c6: #6b6b6b; --c7: #7a2e0e; }
@media (prefers-color-scheme: dark) { :root { --text: #ececec; --soft: #ababab; --line: #454545;
  --back: #161616; --raised: #222222; --bad: #ff9a90; --badback: #3a1c1a;
  --c0: #56b4e9; --c1: #ff8c42; --c2: #35c79b; --c3: #e59ac9; --c4: #e6b422; --c5: #a4d3f5;
  --c6: #b5b5b5; --c7: #d99a7c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .5rem;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--c0); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; }
.problems { border-left: 4px solid var(--bad); background: var(--badback); padding: .75rem 1rem;
  margin: 0 0 1rem; }
.problems ul { margin: .25rem 0 0; }
.scroll { overflow-x: auto; max-width: 100%; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .25rem 0; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { font-weight: 600; }
thead th { white-space: nowrap; vertical-align: bottom; }
thead th[title] { text-decoration: underline dotted var(--soft); text-underline-offset: 3px; }
th.number, td.number { text-align: right; white-space: nowrap; }
td.text, tbody th { overflow-wrap: break-word; min-width: 3rem; max-width: 28rem; }
td.absent { color: var(--soft); }
abbr { text-decoration: none; color: var(--c1); cursor: help; }
thead button { font: inherit; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; text-align: inherit; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.pairs th { color: var(--soft); font-weight: 400; white-space: nowrap; }
.pairs .pairs { margin: 0; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.card { background: var(--raised); border-radius: 6px; padding: .6rem .9rem; min-width: 9rem; }
.card dt { color: var(--soft); font-size: .85rem; }
.card dd { margin: 0; }
.card strong { display: block; font-size: 1.35rem; line-height: 1.3; }
.card span { color: var(--soft); font-size: .85rem; }
pre { background: var(--raised); padding: .6rem .8rem; border-radius: 6px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--soft); }
figure { margin: 1.25rem 0; }
figure > svg { display: block; width: 100%; height: auto; max-width: 48rem; }
figcaption { font-weight: 600; margin-bottom: .35rem; }
.note { color: var(--soft); font-size: .85rem; font-weight: 400; margin: .2rem 0; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; list-style: none; padding: 0;
  margin: .25rem 0; font-size: .85rem; }
.legend svg { width: 28px; height: 12px; margin-right: .4rem; vertical-align: middle; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  fill: var(--text); }
svg .soft { fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 5 3; }
svg .path { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .whisker { stroke-width: 1.5; fill: none; }
svg .weak { opacity: .5; }
svg .dash1 { stroke-dasharray: 7 3; }
svg .dash2 { stroke-dasharray: 2 3; }
svg .dash3 { stroke-dasharray: 9 3 2 3; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.stroke { stroke: var(--c); } .fill { fill: var(--c); }
@media print { :root { color-scheme: light; --text: #000; --soft: #444; --line: #bbb;
    --back: #fff; --raised: #f5f5f3; --bad: #b3261e; --badback: #fff;
    --c0: #0072b2; --c1: #d55e00; --c2: #00845f; --c3: #a5508c; --c4: #946200; --c5: #2b8cc4;
    --c6: #6b6b6b; --c7: #7a2e0e; }
  @page { size: A4; margin: 14mm; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } nav { display: none; }
  table { font-size: 8.5pt; max-width: 100%; } table.wide { font-size: 6.5pt; }
  th, td { padding: .2rem .35rem .2rem 0; }
  thead th, th.number, td.number, .pairs th { white-space: normal; }
  thead th, tbody th, td.text, .pairs th, .pairs td { overflow-wrap: anywhere; }
  td.text, tbody th { min-width: 0; max-width: none; }
  code, pre { overflow-wrap: anywhere; white-space: pre-wrap; }
  figure, tr, .card, .problems { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } }
"""

# A head becomes a button that sorts its column: numbers by value, text by letters.
SCRIPT: Final = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = table.tHead ? table.tHead.rows[0].cells : [];
  if (!body || body.rows.length < 3) continue;
  [...heads].forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[index];
        return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
      };
      const absent = (row) => row.cells[index].classList.contains("absent");
      const order = (a, b) => typeof a === "number" && typeof b === "number"
        ? a - b : String(a).localeCompare(String(b));
      body.append(...[...body.rows].sort((a, b) => (absent(a) - absent(b))
        || (up ? 1 : -1) * order(key(a), key(b))));
    });
  });
}
"""
