// The site's own script: theme, menu, copy buttons, and a search over titles and headings (search.js holds them).
const $ = id => document.getElementById(id), up = document.body.dataset.up;
$("theme").onclick = () => localStorage.setItem("theme", document.documentElement.dataset.theme = document.documentElement.dataset.theme == "dark" ? "light" : "dark");
$("menu").onclick = () => $("menu").setAttribute("aria-expanded", $("sidebar").classList.toggle("open"));
document.querySelector("#sidebar [aria-current]")?.scrollIntoView({block: "nearest"});

for (const pre of document.querySelectorAll("main div.sourceCode")) {
  const button = Object.assign(document.createElement("button"), {className: "copy", textContent: "copy"});
  button.onclick = () => navigator.clipboard.writeText(pre.querySelector("code").innerText).then(() => button.textContent = "copied");
  pre.append(button);
}

const PLACES = INDEX.flatMap(p => [{href: p.href, text: p.title, about: p.about, weight: 0}, ...p.headings.map(([id, text]) => ({href: `${p.href}#${id}`, text, about: p.title, weight: 2}))]);
function find(query) { // every word must occur; names that begin with the query first, then those that hold it, then descriptions
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const rank = p => p.weight + (p.text.toLowerCase() == query ? -9 : p.text.toLowerCase().startsWith(words[0]) ? -3 : words.every(w => p.text.toLowerCase().includes(w)) ? 0 : 6);
  return words.length ? PLACES.filter(p => words.every(w => `${p.text} ${p.about}`.toLowerCase().includes(w))).sort((a, b) => rank(a) - rank(b)).slice(0, 12) : [];
}
function show() {
  const query = $("search").value.trim().toLowerCase(), hits = find(query);
  $("found").replaceChildren(...hits.map((p, i) => {
    const a = Object.assign(document.createElement("a"), {href: up + p.href, textContent: p.text, className: i ? "" : "on"});
    a.append(Object.assign(document.createElement("small"), {textContent: p.about}));
    const li = document.createElement("li"); li.append(a); return li;
  }));
  if (query && !hits.length) $("found").append(Object.assign(document.createElement("li"), {className: "none", textContent: "nothing found in titles and headings"}));
  $("found").hidden = !query;
}
$("search").oninput = show;
$("search").onkeydown = e => {
  const all = [...$("found").querySelectorAll("a")], i = all.findIndex(a => a.className == "on");
  if (e.key == "Escape") { $("search").value = ""; show(); $("search").blur(); }
  else if (e.key == "Enter" && all[i]) { location.href = all[i].href; $("found").hidden = true; }
  else if ((e.key == "ArrowDown" || e.key == "ArrowUp") && all.length) {
    e.preventDefault(); all[i].className = "";
    const next = all[(i + (e.key == "ArrowDown" ? 1 : all.length - 1)) % all.length]; next.className = "on"; next.scrollIntoView({block: "nearest"});
  }
};
document.onclick = e => { if (!e.target.closest(".search")) $("found").hidden = true; };
document.onkeydown = e => { if (e.key == "/" && !e.target.closest("input, textarea")) { e.preventDefault(); $("search").focus(); } };
