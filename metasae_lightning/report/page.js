"use strict";
(async () => {
  const byId = (id) => document.getElementById(id);
  const place = byId("latents");
  if (!place || !byId("list")) return;
  const data = await unpacked(place.textContent.trim());
  const [list, card, choice, sought, order, direction] = ["list", "latent", "arm", "search", "sort", "direction"].map(byId);
  const STEP = 200;
  let found = [], shown = 0, reversed = false, selected = null;

  // A latent of the list is [number, firings, largest value, cosine of its neighbour, of its match, phi of its partner, token]; a judged one
  // has also [explanation, scores, pair in the first judged arm].
  // Its details are [neighbours, match, meta latents, partners, bars, promoted, suppressed, examples, matched by], and of a judged one the
  // judge's words by score; indices refer to `source`.
  const columns = { density: 1, strong: 2, near: 3, match: 4, partner: 5, number: 0 };
  const TOKEN = 6, EXPLANATION = 7, SCORES = 8, PAIR = 9, WORDS = 9, JUDGED = "judged:";
  const NEIGHBOURS = 0, MATCH = 1, METAS = 2, PARTNERS = 3, BARS = 4, PROMOTED = 5, SUPPRESSED = 6, EXAMPLES = 7, MATCHED_BY = 8;
  let first = 0;
  data.arms.forEach((arm, index) => {
    choice.append(new Option(arm.name, String(index)));
    arm.position = new Map(arm.rows.map((row, position) => [row[0], position]));
    arm.files = new Map();
    arm.first = first;
    first += arm.rows.length;
  });
  for (const name of new Set(data.arms.flatMap((arm) => (arm.judged?.scores ?? []).map(([name]) => name)))) order.append(new Option(name, JUDGED + name));
  const waiting = new Map();
  window.latentDetails = (name, text) => unpacked(text).then(waiting.get(name));

  choice.addEventListener("change", () => search());
  sought.addEventListener("input", () => search());
  order.addEventListener("change", () => search());
  direction.addEventListener("click", reverse);
  list.addEventListener("scroll", () => { if (list.scrollTop + list.clientHeight > list.scrollHeight - 200) extend(); });
  list.addEventListener("click", (event) => { const row = event.target.closest(".row"); if (row) select(Number(row.dataset.at)); });
  document.addEventListener("keydown", key);
  window.addEventListener("hashchange", () => follow());
  if (!follow()) search();

  async function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function current() { return data.arms[Number(choice.value)]; }

  // The details of a latent and what their indices refer to, from the page or from a file beside it.
  async function details(arm, position) {
    if (!data.in_file) return { source: data, row: data.details[arm.first + position] };
    const file = Math.floor(position / data.in_file);
    if (!arm.files.has(file)) arm.files.set(file, loaded(`${data.arms.indexOf(arm)}-${file}`));
    const source = await arm.files.get(file);
    return { source, row: source.details[position % data.in_file] };
  }

  function loaded(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      waiting.set(name, resolve);
      script.src = `report/latents/${name}.js`;
      script.onerror = () => reject(new Error(`${script.src} is missing: the folder report/ belongs to the page`));
      document.head.append(script);
    });
  }

  // How well a latent fits the words: 4 it fires on this token, 3 they are in its explanation, 2 it promotes it, 1 they are in its texts.
  function fit(arm, position, words) {
    const token = (text) => text.toLowerCase().trim() === words, listed = arm.rows[position];
    if (token(listed[TOKEN])) return 4;
    const row = data.in_file ? null : data.details[arm.first + position];
    if (row && row[EXAMPLES].some(([text, at]) => token(data.texts[text][at]))) return 4;
    if ((listed[EXPLANATION] ?? "").toLowerCase().includes(words)) return 3;
    if (!row) return listed[TOKEN].toLowerCase().includes(words) ? 1 : 0;
    if (row[PROMOTED].some((index) => token(data.vocabulary[index]))) return 2;
    return row[EXAMPLES].some(([text, at]) => around(data.texts[text], at, 12, 6).toLowerCase().includes(words)) ? 1 : 0;
  }

  function around(tokens, at, before, after) { return tokens.slice(Math.max(0, at - before), at + after + 1).join(""); }

  function search(number) {
    const arm = current(), words = sought.value.toLowerCase().trim(), sorted = order.value;
    const fits = new Map();
    const isNumber = /^#?\d+$/.test(words);
    found = arm.rows.map((_, position) => position).filter((position) => {
      const wanted = isNumber && arm.rows[position][0] === Number(words.replace("#", ""));
      fits.set(position, !words || wanted ? 5 : fit(arm, position, words));
      return fits.get(position) > 0;
    });
    // Scores from the largest, numbers from the smallest; a latent without the score comes last.
    const sign = (sorted === "number" ? 1 : -1) * (reversed ? -1 : 1);
    const scores = new Map(found.map((position) => [position, valueOf(arm, arm.rows[position], sorted) ?? (sign > 0 ? Infinity : -Infinity)]));
    const byScore = (a, b) => (scores.get(a) === scores.get(b) ? 0 : sign * (scores.get(a) - scores.get(b)));
    found.sort((a, b) => fits.get(b) - fits.get(a) || byScore(a, b) || a - b);
    const left = arm.rows.length < arm.live ? ` (${arm.rows.length.toLocaleString("en")} of ${arm.live.toLocaleString("en")} that fired are in this page)` : "";
    const kinds = [[4, "fire on it"], [3, "have it in their explanations"], [2, "promote it"], [1, "have it in their texts"]].map(([value, verb]) => [[...fits.values()].filter((fit) => fit === value).length, verb]);
    const told = words && !isNumber ? `: ${kinds.filter(([count]) => count).map(([count, verb]) => `${count.toLocaleString("en")} ${verb}`).join(", ")}` : "";
    byId("count").textContent = `${found.length.toLocaleString("en")} latents${told}${left}`;
    list.replaceChildren();
    shown = 0;
    list.scrollTop = 0;
    extend();
    const at = number === undefined ? 0 : found.indexOf(arm.position.get(number));
    selected = null;
    if (found.length) select(Math.max(at, 0), number !== undefined); else card.replaceChildren();
  }

  function reverse() {
    reversed = !reversed;
    direction.textContent = reversed ? "↑" : "↓";
    search();
  }

  function extend() {
    const arm = current(), shownScore = order.value === "number" ? "density" : order.value;
    const rows = found.slice(shown, shown + STEP).map((position, at) => {
      const row = arm.rows[position], made = element("div", undefined, "row");
      made.setAttribute("role", "option");
      made.id = `row-${shown + at}`;
      made.dataset.at = String(shown + at);
      made.append(element("b", `#${row[0]}`), element("span", visible(row[TOKEN]), "token"), element("small", scored(arm, row, shownScore)));
      return made;
    });
    list.append(...rows);
    shown += rows.length;
  }

  // The value that a latent is sorted by; null or undefined if it has none.
  function valueOf(arm, row, name) {
    if (!name.startsWith(JUDGED)) return row[columns[name]];
    const index = (arm.judged?.scores ?? []).findIndex(([score]) => score === name.slice(JUDGED.length));
    return index < 0 ? null : row[SCORES]?.[index];
  }

  function scored(arm, row, name) {
    const value = valueOf(arm, row, name) ?? null;
    if (value === null) return "–";
    return name === "density" ? `${percent(value / arm.tokens)} %` : String(value);
  }

  function percent(share) { return (100 * share).toPrecision(2).replace(/e.*/, (part) => part); }

  // Selects a latent of the list; `linked` writes its permanent link into the address.
  async function select(at, linked = true) {
    if (at < 0 || at >= found.length) return;
    while (at >= shown) extend();
    const arm = current(), position = found[at];
    if (selected !== null) byId(`row-${selected}`)?.removeAttribute("aria-selected");
    selected = at;
    const row = byId(`row-${at}`);
    row.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", row.id);
    if (row.offsetTop < list.scrollTop || row.offsetTop + row.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = row.offsetTop - list.clientHeight / 3;
    if (linked) history.replaceState(null, "", link(arm, arm.rows[position][0]));
    const { source, row: detail } = await details(arm, position);
    if (found[selected] === position && current() === arm) show(arm, arm.rows[position], detail, source);
  }

  function link(arm, number) { return `#latent/${encodeURIComponent(arm.name)}/${number}`; }

  // Goes to the latent in the address, if there is one.
  function follow() {
    const match = /^#latent\/([^/]*)\/(\d+)$/.exec(location.hash);
    const arm = match && data.arms.find((one) => encodeURIComponent(one.name) === match[1]);
    if (!arm || !arm.position.has(Number(match[2]))) return false;
    jump(arm, Number(match[2]));
    return true;
  }

  function jump(arm, number) {
    choice.value = String(data.arms.indexOf(arm));
    sought.value = "";
    search(number);
    byId("browser").scrollIntoView();
  }

  function key(event) {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (typing && event.key === "Escape") { event.target.blur(); list.focus({ preventScroll: true }); return; }
    if (typing) return;
    const inList = event.target === list;
    const steps = { j: 1, k: -1, ...(inList ? { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 } : {}) };
    if (event.key in steps) select(Math.min(Math.max((selected ?? 0) + steps[event.key], 0), found.length - 1));
    else if (event.key === "/") { byId("browser").scrollIntoView(); sought.focus(); sought.select(); }
    else if (event.key === "r") reverse();
    else if (event.key === "m") card.querySelector(".match button:not([disabled])")?.click();
    else return;
    event.preventDefault();
  }

  function element(name, text, kind) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function drawn(name, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
    return made;
  }

  // Every character is shown as text; those that would act on the text are named instead.
  function visible(text) {
    return text
      .replace(/\n/g, "⏎")
      .replace(/\t/g, "⇥")
      .replace(/[\u0000-\u001f]/g, (letter) => String.fromCharCode(0x2400 + letter.charCodeAt(0)))
      .replace(/[\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (letter) => `‹U+${letter.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}›`);
  }

  function show(arm, row, detail, source) {
    const [number, firings, largest, , , , token] = row;
    const head = element("h3", `#${number} `);
    const address = element("a", "link");
    address.href = link(arm, number);
    head.append(element("span", visible(token), "token"), " ", element("small", `fires on ${percent(firings / arm.tokens)} % of tokens, at most ${largest} · `), address);
    const panels = element("div", undefined, "panels");
    if (detail[BARS]) panels.append(panel("Activations", bars(detail[BARS], largest)));
    if (detail[PROMOTED].length) panels.append(panel("Promotes", tokens(detail[PROMOTED], source)), panel("Suppresses", tokens(detail[SUPPRESSED], source)));
    const other = data.arms.find((one) => one.arm === arm.other);
    const relations = element("div", undefined, "panels");
    relations.append(panel("Fires together with, phi", links(detail[PARTNERS], arm)), panel("Nearest decoder rows, cosine", links(detail[NEIGHBOURS], arm)));
    if (detail[MATCH].length && other) {
      const match = panel(`Nearest in ${other.name}, cosine`, links([detail[MATCH]], other));
      match.classList.add("match");
      relations.append(match);
      // Both sides of a split: several latents of the other arm are nearest to this one.
      if (detail[MATCHED_BY].length > 1) relations.append(panel(`Split in ${other.name} into, cosine`, links(detail[MATCHED_BY], other)));
    }
    const texts = element("div", undefined, "texts");
    texts.append(...detail[EXAMPLES].map((example) => context(example, source, largest)));
    card.replaceChildren(head, ...(row[SCORES] ? [judgement(arm, row, detail[WORDS] ?? [])] : []), panels, texts, relations);
    if (detail[METAS].length) {
      const picture = shared(detail[METAS], arm, number, token);
      card.append(panel("Meta-latents that compose its decoder row, and the latents that share them", picture));
      connect(picture);
    }
  }

  // What a judge said of a latent: explanation, scores, its words, and the pair in the other arm.
  function judgement(arm, row, words) {
    const made = element("div", undefined, "judgement"), scores = element("div", undefined, "scores");
    if (row[EXPLANATION]) {
      const text = element("p", undefined, "explanation");
      text.append(element("bdi", visible(row[EXPLANATION])));
      made.append(text);
    }
    arm.judged.scores.forEach(([name, chance], index) => {
      if (row[SCORES][index] === null) return;
      const score = element("span", `${visible(name)} `);
      score.append(element("b", row[SCORES][index].toFixed(2)), ...(chance === null ? [] : [element("small", ` chance ${chance.toFixed(2)}`)]));
      scores.append(score);
    });
    made.append(scores);
    const pair = pairOf(arm, row);
    if (pair) made.append(panel(`Its pair in ${visible(pair.arm.name)}, cosine`, links([pair.link], pair.arm)));
    if (words.some((answers) => answers.length)) made.append(judgeWords(arm, words));
    return made;
  }

  function judgeWords(arm, words) {
    const made = element("details", undefined, "words");
    made.append(element("summary", "What the judge wrote"));
    words.forEach((answers, index) => {
      if (answers.length) made.append(element("h4", visible(arm.judged.scores[index][0])));
      for (const answer of answers) {
        const text = element("p");
        text.append(element("bdi", visible(answer)));
        made.append(text);
      }
    });
    return made;
  }

  // The pair of a latent in the other arm: as recorded, or for a latent of the first judged arm the one whose pair it is.
  function pairOf(arm, row) {
    const first = data.arms.find((one) => one.arm === arm.judged.first);
    if (row[PAIR].length) return first && { arm: first, link: row[PAIR] };
    for (const other of data.arms) {
      if (other.judged?.first !== arm.arm) continue;
      const paired = other.rows.find((one) => one[PAIR]?.length && one[PAIR][0] === row[0]);
      if (paired) return { arm: other, link: [paired[0], paired[PAIR][1]] };
    }
    return null;
  }

  function panel(title, content) {
    const made = element("section", undefined, "panel");
    made.append(element("h4", title), content);
    return made;
  }

  function bars(heights, largest) {
    const made = drawn("svg", { viewBox: `0 0 ${heights.length * 10} 40`, class: "bars", role: "img", preserveAspectRatio: "none" });
    made.append(drawn("title", {}));
    made.firstChild.textContent = "Number of firings by activation, square roots";
    [...heights].forEach((digit, index) => {
      const height = parseInt(digit, 36) + (digit === "0" ? 0 : 2);
      made.append(drawn("rect", { x: index * 10 + 1, y: 38 - height, width: 8, height }));
    });
    const box = element("div"), axis = element("div", undefined, "axis");
    axis.append(element("span", "0"), element("span", String(largest)));
    box.append(made, axis);
    return box;
  }

  function tokens(indices, source) {
    const made = element("div", undefined, "chips");
    made.append(...indices.map((index) => element("span", visible(source.vocabulary[index]), "token")));
    return made;
  }

  function hint(number, arm) { return arm.position.has(number) ? visible(arm.rows[arm.position.get(number)][TOKEN]) : ""; }

  function latentButton(number, arm) {
    const made = element("button", `#${number}`);
    made.type = "button";
    made.append(element("span", hint(number, arm), "token"));
    if (!arm.position.has(number)) made.disabled = true;
    made.addEventListener("click", () => jump(arm, number));
    return made;
  }

  function links(pairs, arm) {
    const made = element("div", undefined, "chips");
    for (const [number, value] of pairs) {
      const button = latentButton(number, arm);
      button.append(element("small", value.toFixed(2)));
      made.append(button);
    }
    if (!pairs.length) made.append("none");
    return made;
  }

  // One line of text with the token in its middle; a click shows the whole text.
  function context([text, at, quantile, fired], source, largest) {
    const words = source.texts[text], values = new Map();
    for (let index = 0; index < fired.length; index += 2) values.set(at + fired[index], fired[index + 1]);
    const made = element("details", undefined, "context"), line = element("summary");
    const stretch = (begin, end) => words.slice(begin, end).map((word, index) => marked(word, values.get(begin + index), largest, begin + index === at));
    const [before, middle, after] = [[Math.max(0, at - 24), at], [at, at + 1], [at + 1, at + 25]].map(([begin, end], part) => {
      const box = element("span", undefined, ["before", "middle", "after"][part]);
      const inner = element("bdi");
      inner.append(...stretch(begin, end));
      box.append(inner);
      return box;
    });
    line.append(element("small", quantile === null ? "" : quantile > 0.995 ? "max" : `${Math.round(100 * quantile)} %`), before, middle, after);
    const whole = element("p");
    whole.dir = "auto";
    made.append(line, whole);
    made.addEventListener("toggle", () => { if (!whole.firstChild) whole.append(...stretch(Math.max(0, at - 64), at + 33)); });
    return made;
  }

  function marked(word, value, largest, isMiddle) {
    if (!value) return isMiddle ? element("mark", visible(word), "at") : visible(word);
    const made = element("mark", visible(word), isMiddle ? "at" : "");
    made.style.backgroundColor = `rgb(var(--hot) / ${(0.12 + 0.006 * value).toFixed(2)})`;
    made.title = ((value * largest) / 100).toPrecision(2);
    return made;
  }

  // The latent, its meta-latents, and beside each the other latents that it composes; `connect` draws the lines.
  function shared(metas, arm, number, token) {
    const made = element("div", undefined, "composition"), own = element("span", `#${number}`, "own");
    own.append(element("span", visible(token), "token"));
    own.style.gridRow = `1 / span ${metas.length}`;
    made.append(drawn("svg", { "aria-hidden": "true" }), own);
    for (const [meta, value] of metas) {
      const line = element("div", undefined, "meta"), name = element("span", `meta ${meta}`, "name");
      name.append(element("small", value.toFixed(2)));
      line.dataset.value = String(value / metas[0][1]);
      line.append(name, links((arm.metas[meta] || []).filter(([other]) => other !== number).slice(0, 6), arm));
      made.append(line);
    }
    return made;
  }

  function connect(picture) {
    const svg = picture.querySelector("svg"), own = picture.querySelector(".own");
    new ResizeObserver(() => {
      svg.replaceChildren();
      const from = [own.offsetLeft + own.offsetWidth, own.offsetTop + own.offsetHeight / 2];
      for (const line of picture.querySelectorAll(".meta")) {
        const name = line.querySelector(".name"), to = [name.offsetLeft, name.offsetTop + name.offsetHeight / 2], middle = (from[0] + to[0]) / 2;
        svg.append(drawn("path", { d: `M${from} C${middle},${from[1]} ${middle},${to[1]} ${to}`, "stroke-width": 1 + 4 * line.dataset.value }));
      }
    }).observe(picture);
  }
})().catch((error) => {
  const count = document.getElementById("count");
  if (count) count.textContent = `The latents cannot be shown here: ${error.message}`;
});
