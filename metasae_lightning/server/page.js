"use strict";
(async () => {
  const byId = (id) => document.getElementById(id);
  const [text, arm, message, latent] = ["text", "arm", "message", "latent"].map(byId);
  // What the server found in a text, with the text; the position of the chosen token, and the chosen latent.
  let found = null, at = null, chosen = null;

  byId("typed").addEventListener("submit", (event) => { event.preventDefault(); read(); });
  byId("steer").addEventListener("submit", (event) => { event.preventDefault(); steer(); });
  text.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) read(); });
  arm.addEventListener("change", () => { chosen = null; byId("continuations").hidden = true; limit(); draw(); });
  latent.addEventListener("input", () => { chosen = latent.value === "" ? null : Number(latent.value); draw(); });

  const served = await ask("description");
  if (!served) return;
  byId("model").textContent = `${served.model}, ${served.hook}`;
  for (const { name } of served.arms) arm.append(new Option(name, name));
  byId("count").max = served.tokens;
  limit();
  byId("steering").hidden = false;

  function limit() { latent.max = served.arms[arm.selectedIndex].latents - 1; }

  // The server's answer; null after an error, which is shown.
  async function ask(path, content) {
    say("The model is working.", false);
    const buttons = [...document.querySelectorAll("form button")];
    for (const button of buttons) button.disabled = true;
    try {
      const sent = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) };
      const reply = await fetch(path, content && sent);
      const isJson = (reply.headers.get("Content-Type") || "").startsWith("application/json");
      const answer = isJson ? await reply.json() : { error: `the server failed (${reply.status})` };
      say(reply.ok ? "" : answer.error, !reply.ok);
      return reply.ok ? answer : null;
    } catch {
      say("the server does not answer", true);
      return null;
    } finally {
      for (const button of buttons) button.disabled = false;
    }
  }

  function say(words, isBad) {
    message.textContent = words;
    message.className = isBad ? "bad" : "";
  }

  async function read() {
    const answer = await ask("firings", { text: text.value });
    if (!answer) return;
    found = answer;
    at = chosen = null;
    byId("continuations").hidden = true;
    byId("reading").hidden = false;
    draw();
  }

  async function steer() {
    const typed = text.value, strength = Number(byId("strength").value), number = Number(latent.value);
    const content = { text: typed, arm: arm.value, latent: number, strength, count: Number(byId("count").value) };
    const answer = await ask("continuations", content);
    if (!answer) return;
    byId("changed").textContent = `With latent ${number} at strength ${strength}`;
    for (const kind of ["plain", "steered"]) {
      const before = document.createElement("span");
      before.textContent = typed;
      byId(kind).replaceChildren(before, answer[kind] || " (ends here)");
    }
    byId("continuations").hidden = false;
  }

  function firings() { return found.arms[arm.selectedIndex].firings; }

  function valueAt(position) {
    const here = firings()[position];
    return chosen === null ? here[0]?.[1] ?? 0 : here.find(([number]) => number === chosen)?.[1] ?? 0;
  }

  function draw() {
    if (!found) return;
    const values = found.tokens.map((_, position) => valueAt(position)), largest = Math.max(...values) || 1;
    const focused = document.activeElement?.dataset?.key;
    byId("tokens").replaceChildren(...found.tokens.map((token, position) => {
      const button = pressable(`token ${position}`, token.replaceAll("\n", "⏎") || "\u200b", position === at, () => { at = position; draw(); });
      button.disabled = !found.read[position];
      button.title = values[position] ? `activation ${values[position]}` : "";
      button.style.backgroundColor = values[position] > 0 ? `rgb(var(--hot) / ${0.6 * values[position] / largest})` : "transparent";
      return button;
    }));
    const here = at === null ? [] : firings()[at];
    byId("token").textContent = at === null ? "" : `Latents on “${found.tokens[at]}”${here.length ? "" : ": none"}`;
    byId("latents").replaceChildren(...here.map(([number, value]) => {
      const button = pressable(`latent ${number}`, `#${number}`, number === chosen, () => choose(number));
      const activation = document.createElement("small");
      activation.textContent = value;
      button.append(activation);
      return button;
    }));
    [...document.querySelectorAll("[data-key]")].find((button) => button.dataset.key === focused)?.focus();
  }

  function pressable(key, words, isPressed, press) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.key = key;
    button.textContent = words;
    button.setAttribute("aria-pressed", String(isPressed));
    button.addEventListener("click", press);
    return button;
  }

  // A latent is steered by ten times its largest activation in the text, unless another strength is typed.
  function choose(number) {
    chosen = number === chosen ? null : number;
    latent.value = number;
    if (chosen !== null) {
      const largest = Math.max(...found.tokens.map((_, position) => valueAt(position)));
      byId("strength").value = Number((10 * largest).toPrecision(3));
    }
    draw();
  }
})();
