// A prompt, sent like any client's; what it does to the blocks is seen beside it.

const playground = { abort: null, request: null, texts: [], ranked: false };

function say(text, state = "") {
  setText($("said"), text);
  $("said").dataset.state = state;
}

function drawAnswers() {
  const sequences = names.requests.get(`${playground.request}-0`)?.sequences ?? [];
  $("answers").replaceChildren(...playground.texts.map((text, i) => {
    const answer = make("li"), seq = playground.ranked ? undefined : sequences[i];
    answer.append(seq === undefined ? make("span", "name", i + 1) : names.badge(seq), text);
    return answer;
  }));
}

// The events of a stream of server-sent events, one by one.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

async function send() {
  const beams = $("how").value === "beams", n = Number($("outputs").value);
  const body = { prompt: $("prompt").value, max_tokens: Number($("tokens").value), n };
  if (beams) body.use_beam_search = true;
  else Object.assign(body, { stream: true, temperature: Number($("temperature").value) });
  Object.assign(playground, { abort: new AbortController(), request: null, texts: [], ranked: beams });
  const began = performance.now();
  seen.begin();
  drawAnswers();
  busy(true);
  say(beams ? "searching; the best are known when all have ended" : "sent");
  try {
    const response = await fetch("v1/completions", {
      method: "POST",
      headers: { ...connection.headers(), "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: playground.abort.signal,
    });
    if (!response.ok) {
      if (response.status === 401) askForKey("The server wants another key than this.");
      throw new Error(await problem(response));
    }
    if (beams) take(await response.json());
    else await takeStream(response);
    say(`done in ${seconds((performance.now() - began) / 1000)}; Play shows it step by step`);
  } catch (error) {
    if (error.name === "AbortError") say("stopped: its blocks are free again");
    else say(error instanceof TypeError ? "the server cannot be reached" : error.message, "wrong");
  } finally {
    busy(false);
    drawAnswers();
  }
}

function take(event) {
  playground.request = event.id;
  for (const choice of event.choices) {
    playground.texts[choice.index] = (playground.texts[choice.index] ?? "") + choice.text;
  }
}

async function takeStream(response) {
  let drawn = 0;
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    take(event);
    if (performance.now() - drawn < 80) continue;
    drawAnswers();
    say("streaming");
    drawn = performance.now();
  }
  throw new Error("the stream broke off");
}

function busy(on) {
  const [from, to] = on ? [$("send"), $("stop")] : [$("stop"), $("send")];
  const moves = document.activeElement === from;  // whoever pressed the one has the other next
  to.disabled = false;
  if (moves) to.focus({ preventScroll: true });
  from.disabled = true;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => playground.abort?.abort());
$("how").addEventListener("change", () => { $("temperature").disabled = $("how").value === "beams"; });
