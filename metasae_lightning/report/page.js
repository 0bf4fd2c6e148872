"use strict";
(async () => {
  const place = document.getElementById("latents");
  const list = document.getElementById("list");
  if (!place || !list) return;
  const arms = await unpacked(place.textContent.trim());
  const choice = document.getElementById("arm");
  const sought = document.getElementById("search");
  const order = document.getElementById("sort");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const PAGE = 25;
  let found = [];
  let shown = 0;

  // A latent is [number, firings, largest value, neighbours, match, meta latents, contexts].
  const orders = {
    density: (a, b) => b[1] - a[1],
    rare: (a, b) => a[1] - b[1],
    number: (a, b) => a[0] - b[0],
    strong: (a, b) => b[2] - a[2],
    near: (a, b) => cosine(b[3][0]) - cosine(a[3][0]),
    match: (a, b) => cosine(a[4]) - cosine(b[4]),
  };
  arms.forEach((arm, index) => choice.append(new Option(arm.name, String(index))));
  arms.forEach((arm) => { arm.byNumber = new Map(arm.rows.map((row) => [row[0], row])); });
  for (const control of [choice, order]) control.addEventListener("change", search);
  sought.addEventListener("input", search);
  more.addEventListener("click", () => show(PAGE));
  search();

  async function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function cosine(pair) { return pair && pair.length ? pair[1] : -1; }

  function current() { return arms[Number(choice.value)]; }

  function search() {
    const words = sought.value.toLowerCase().trim();
    const number = /^#?\d+$/.test(words) ? Number(words.replace("#", "")) : null;
    found = current().rows.filter((row) => {
      if (!words) return true;
      if (number !== null && row[0] === number) return true;
      return row[6].some((context) => context[1].join("").toLowerCase().includes(words));
    });
    found.sort(number === null ? orders[order.value] : (a, b) => (b[0] === number) - (a[0] === number) || orders[order.value](a, b));
    const arm = current();
    const all = arm.rows.length < arm.live ? ` (${arm.rows.length.toLocaleString("en")} of ${arm.live.toLocaleString("en")} that fired are in this page)` : "";
    count.textContent = `${found.length.toLocaleString("en")} latents${all}`;
    list.replaceChildren();
    shown = 0;
    show(PAGE);
  }

  function show(some) {
    const next = found.slice(shown, shown + some);
    list.append(...next.map(card));
    shown += next.length;
    more.hidden = shown >= found.length;
  }

  function element(name, text, kind) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function card(row) {
    const [number, firings, largest, near, match, metas, contexts] = row;
    const arm = current();
    const made = element("article", undefined, "latent");
    const head = element("h3", `#${number}`);
    const share = (100 * firings) / arm.tokens;
    head.append(" ", element("small", `fires on ${share.toPrecision(3)} % of tokens, at most ${largest}`));
    made.append(head);
    for (const [at, tokens, values] of contexts) made.append(stretch(at, tokens, values));
    if (near.length) made.append(line("Decoder neighbours: ", near, arm));
    if (match.length && arm.other !== null) {
      const other = arms.find((one) => one.arm === arm.other);
      made.append(line(`Nearest in ${other ? other.name : "the other arm"}: `, [match], other));
    }
    if (metas.length) made.append(parts(metas, arm, number));
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

  function stretch(at, tokens, values) {
    const made = element("p", undefined, "context");
    made.dir = "auto";
    const largest = Math.max(...values);
    tokens.forEach((token, place) => {
      if (!(values[place] > 0)) { made.append(visible(token)); return; }
      const mark = element("mark", visible(token), place === at ? "at" : "");
      mark.style.backgroundColor = `rgb(var(--hot) / ${(0.15 + (0.6 * values[place]) / largest).toFixed(2)})`;
      mark.title = String(values[place]);
      made.append(mark);
    });
    return made;
  }

  function jump(number, arm) {
    const made = element("button", `#${number}`);
    made.type = "button";
    if (!arm || !arm.byNumber.has(number)) { made.disabled = true; return made; }
    const context = arm.byNumber.get(number)[6][0];
    if (context) made.title = visible(context[1].join(""));
    made.addEventListener("click", () => {
      choice.value = String(arms.indexOf(arm));
      sought.value = `#${number}`;
      search();
      document.getElementById("browser").scrollIntoView();
    });
    return made;
  }

  // What a latent of an arm fires on most, to name it by.
  function hint(number, arm) {
    const row = arm && arm.byNumber.get(number);
    return row && row[6].length ? ` “${visible(row[6][0][1][row[6][0][0]]).trim().slice(0, 24)}”` : "";
  }

  function line(words, pairs, arm) {
    const made = element("p", words, "near");
    pairs.forEach(([number, value], place) => made.append(place ? ", " : "", jump(number, arm), hint(number, arm), ` ${value.toFixed(2)}`));
    return made;
  }

  function parts(metas, arm, own) {
    const made = element("div", undefined, "near");
    made.append(`Put together by ${metas.length} meta latent${metas.length > 1 ? "s" : ""}:`);
    const all = element("ul");
    for (const [meta, value] of metas) {
      const entry = element("li", `meta ${meta} (${value.toFixed(2)}), shared with `);
      const others = (arm.metas[meta] || []).filter(([number]) => number !== own);
      if (!others.length) entry.append("no other latent");
      others.forEach(([number], place) => entry.append(place ? ", " : "", jump(number, arm), hint(number, arm)));
      all.append(entry);
    }
    made.append(all);
    return made;
  }
})().catch((error) => {
  const count = document.getElementById("count");
  if (count) count.textContent = `The latents cannot be shown here: ${error.message}`;
});
