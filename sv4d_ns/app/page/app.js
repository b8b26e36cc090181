"use strict";
// The page asks for the list and for the job that is shown once a second; an address with #ID shows that job.
const $ = (id) => document.getElementById(id);
const STATES = {
  looking: "The video is being looked at; this takes some seconds, a minute where it is large.",
  refused: "This video cannot be used as it is.",
  ready: "Look at what was found, then start.",
  waiting: "Waiting for its turn.",
  running: "Under way. This page may be closed; the run goes on.",
  stopped: "Stopped. It goes on where it was.",
  failed: "It ended with an error. Starting again goes on where it was.",
  finished: "Finished.",
};
const WORDS = { looking: "being looked at", refused: "cannot be used", ready: "ready to start" };
const MARKS = { magenta: "#ff00dc", cyan: "#00d2ff", yellow: "#ffe100", green: "#00dc3c", orange: "#ff8200" };
const MATTINGS = { u2netp: "The model of this package", "isnet-general-use": "ISNet (rembg), a larger model" };
let known = { jobs: [], mattings: [], suffixes: [], max_bytes: 0 };
let shown = null, sending = null, shownVersion = "";

// ------------------------------------------------------------------------------------------------- asking the server
async function ask(path, options) {
  const answer = await fetch(path, options);
  const value = await answer.json().catch(() => ({ error: "The server's answer cannot be read." }));
  if (!answer.ok) throw new Error(value.error || answer.statusText);
  return value;
}
const post = (path, body) => ask(path, { method: "POST", headers: { "X-Sv4d-App": "1" }, body: body && JSON.stringify(body) });
function trouble(sentence) { $("trouble").hidden = !sentence; $("trouble").textContent = sentence || ""; }
async function act(action, body) {
  try {
    trouble("");
    await post(`api/jobs/${shown}/${action}`, body);
    if (action === "delete") location.hash = "";
  } catch (error) { trouble(error.message); }
  await refresh();
}

// --------------------------------------------------------------------------------------------------------- uploading
function send(file) {
  trouble("");
  if (!file) return;
  const suffix = /\.[^.]+$/.exec(file.name.toLowerCase());
  if (!suffix || !known.suffixes.includes(suffix[0])) return trouble(`${file.name} does not end like a video (${known.suffixes.join(", ")}): choose one of these.`);
  if (file.size > known.max_bytes) return trouble(`${file.name} has ${size(file.size)}, and this server takes ${size(known.max_bytes)} at most: shorten the video, or start sv4d app with a larger --max-upload-mb.`);
  sending = new XMLHttpRequest(); // fetch tells nothing of what is sent
  sending.open("POST", "api/jobs");
  sending.setRequestHeader("X-Sv4d-App", "1");
  sending.setRequestHeader("X-File-Name", encodeURIComponent(file.name));
  sending.upload.onprogress = (event) => { $("sent").value = event.loaded / event.total; };
  sending.onloadend = () => {
    const status = sending.status, text = sending.responseText;
    sending = null;
    $("sending").hidden = true;
    $("drop").hidden = false;
    $("file").value = "";
    if (status === 200) location.hash = JSON.parse(text).id;
    else if (text) trouble(JSON.parse(text).error);
    else if (!cancelled) trouble("The video could not be sent: is the server still running?");
    cancelled = false;
    refresh();
  };
  $("sent").value = 0;
  $("sending-name").textContent = `${file.name} (${size(file.size)})`;
  $("sending").hidden = false;
  $("drop").hidden = true;
  sending.send(file);
}
let cancelled = false;
$("send-stop").onclick = () => { cancelled = true; sending.abort(); };
$("file").onchange = () => send($("file").files[0]);
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name !== "drop") return;
    const files = event.dataTransfer.files;
    if (sending) return trouble("One video is being sent: drop the next one when it is there.");
    send(files[0]);
    if (files.length > 1) trouble(`One video at a time: ${files[0].name} is being sent, drop the others after it.`);
  });
}

// ----------------------------------------------------------------------------------------------------------- showing
const size = (bytes) => (bytes < 1e5 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`);
function clock(seconds) {
  const whole = Math.max(Math.round(seconds), 0), minutes = Math.floor(whole / 60);
  if (whole < 60) return `${whole} s`;
  return minutes < 60 ? `${minutes} min ${whole % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}
// what has not changed is left alone: focus, playing films and screen readers are not disturbed
const drawn = new Map();
function fill(id, value, children) {
  const text = JSON.stringify(value);
  if (drawn.get(id) === text) return;
  drawn.set(id, text);
  $(id).replaceChildren(...children());
}
function source(image, address) { if (image.getAttribute("src") !== address) image.src = address; }

function showList() {
  $("none").hidden = known.jobs.length > 0;
  fill("runs", [known.jobs, shown], () => known.jobs.map((job) => {
    const link = element("a", { href: `#${job.id}` }, job.title,
      element("small", {}, element("span", { className: job.state }, WORDS[job.state] || job.state), `, ${new Date(1000 * job.added).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}`));
    if (job.id === shown) link.setAttribute("aria-current", "true");
    return element("li", {}, link);
  }));
}

function showJob(job) {
  const file = (key, more = "") => `files/${job.id}/${key}${more}`, has = (key) => job.files.includes(key);
  $("title").textContent = job.title;
  document.title = `${job.title}: ${WORDS[job.state] || job.state}`;
  const what = job.state === "looking" ? "video" : "run";
  const before = job.before ? ` ${job.before === 1 ? `One ${what} is` : `${job.before} ${what}s are`} before it.` : "";
  $("state").textContent = job.stopping ? "Stopping; what was done is being saved." : STATES[job.state] + before;
  $("error").hidden = !job.error;
  $("error").textContent = job.error;
  showActions(job);
  showProgress(job);
  showLook(job, file);
  $("choices").hidden = !["ready", "refused"].includes(job.state);

  const views = job.files.filter((key) => key.startsWith("view-")).sort((a, b) => a.length - b.length || (a < b ? -1 : 1));
  const version = `?${job.phase ?? job.since}`;
  $("views").hidden = !(views.length || has("sheet"));
  $("views-title").textContent = job.state === "finished" ? "Views it was made from" : "Views so far";
  fill("pictures", [job.id, views, version], () => views.map((key, number) => element("figure", {},
    element("img", { src: file(key, version), alt: number ? `Generated view ${number}` : "The input video" }),
    element("figcaption", {}, number ? `view ${number}` : "input"))));
  $("sheet-box").hidden = !has("sheet");
  if (has("sheet")) source($("sheet"), file("sheet", version));

  $("result").hidden = job.state !== "finished";
  if (job.state === "finished") showResult(job, file);
  else $("viewer").removeAttribute("src");
}

function showActions(job) {
  const button = (text, action, kind = "") => element("button", { type: "button", textContent: text, className: kind, onclick: action });
  const remove = () => button("Delete", () => { if (confirm(`Delete ${job.title} and all its files?`)) act("delete"); }, "danger");
  fill("actions", [job.id, job.state, job.stopping, job.begun], () => ({
    looking: () => [button("Cancel", () => act("cancel"))],
    ready: () => [button("Start", () => act("start"), "main"), remove()],
    refused: () => [button("Look again", look), remove()],
    waiting: () => [button("Cancel", () => act("cancel"))],
    running: () => (job.stopping ? [] : [button("Cancel", () => act("cancel"))]),
    stopped: () => [button("Go on", () => act("start"), "main"), remove()],
    failed: () => [button("Try again", () => act("start"), "main"), remove()],
    finished: () => [remove()],
  }[job.state] || (() => []))());
}

function showProgress(job) {
  $("progress").hidden = job.state !== "running";
  if (job.state !== "running") return;
  const { done, total, left, run_left: runLeft, note, phase } = job.progress;
  $("phase").textContent = `${job.phases[job.phase]}${phase && job.phase >= 5 ? `: ${phase.toLowerCase()}` : ""}`;
  if (done < total) $("bar").value = done / total; else $("bar").removeAttribute("value");
  const parts = [
    done < total && left !== null ? `this phase: ${clock(left)} left` : null,
    runLeft ? `the run: ${clock(runLeft)} left, then the files` : job.phase < 3 && job.about ? `the whole run: ${job.about}` : null,
    note ? `likeness to the video ${note}` : null,
  ].filter(Boolean);
  $("left").textContent = parts.join(" · ") || "Starting takes some seconds.";
  fill("phases", [job.phases, job.phase], () => job.phases.map((name, number) => {
    const item = element("li", { textContent: name, className: number < job.phase ? "done" : number === job.phase ? "now" : "" });
    if (number === job.phase) item.setAttribute("aria-current", "step");
    return item;
  }));
}

function showLook(job, file) {
  const look = job.look;
  $("look").hidden = !look;
  if (!look) return;
  const version = `?${job.matting}-${job.crop}`;
  source($("crop"), file("crop", version));
  source($("strip"), file("cutout", version));
  if (drawn.get("cutout") !== job.id + version) {
    drawn.set("cutout", job.id + version);
    $("cutout").style.backgroundImage = `url("${file("cutout", version)}")`;
    $("cutout").getAnimations().forEach((old) => old.cancel());
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (look.frames > 1 && !still) {
      // the frames lie side by side: one after the other is shown
      const frames = Array.from({ length: look.frames }, (_, n) => ({ backgroundPositionX: `${(100 * n) / (look.frames - 1)}%`, offset: n / look.frames, easing: "step-end" }));
      frames.push({ ...frames[look.frames - 1], offset: 1 });
      $("cutout").animate(frames, { duration: (1000 * look.frames) / look.fps, iterations: Infinity });
    }
  }
  $("facts").textContent = `${look.frames} frames, ${+look.fps.toFixed(2)} a second; sure of it to ${Math.round(100 * look.confidence)} %`;
  const findings = look.findings.length ? look.findings : [{ text: "Nothing was found that would spoil the result.", fine: true }];
  fill("findings", findings, () => findings.map(({ text, mark, fine }) => {
    const dot = mark ? element("i", { title: `${mark} in the picture` }) : null;
    if (dot) dot.style.background = MARKS[mark];
    return element("li", { className: fine ? "fine" : "" }, dot, text);
  }));
  fill("messages", look.messages, () => look.messages.map((text) => element("li", {}, text)));
}

function showResult(job, file) {
  source($("viewer"), file("index.html"));
  sizeViewer();
  fill("summary", job.summary, () => job.summary.map((text) => element("li", {}, text)));
  fill("downloads", [job.id, job.downloads], () => job.downloads.map(({ file: key, label, what, bytes }) =>
    element("li", {}, element("a", { href: file(key, "?save"), download: "" }, label, element("small", {}, `${what}, ${size(bytes)}`)))));
  const movies = job.files.filter((key) => key.startsWith("movie-"));
  $("movies").hidden = !movies.length;
  fill("films", [job.id, movies], () => movies.map((key) => element("figure", {},
    element("video", { src: file(key), controls: true, loop: true, muted: true, playsInline: true, preload: "metadata" }),
    element("figcaption", {}, key.slice("movie-".length)))));
}
// from 641 pixels on the viewer has two square panes side by side, else one below the other; it may not be asked, being
// in a sandbox
function sizeViewer() {
  const width = $("viewer").clientWidth;
  if (width) $("viewer").style.height = `${width < 641 ? 1.4 * width + 350 : width / 2 + 260}px`;
}
addEventListener("resize", sizeViewer);

async function refresh() {
  const wanted = /^#[0-9a-f]+$/.test(location.hash) ? location.hash.slice(1) : null;
  try {
    known = await ask("api/jobs");
    if (drawn.get("lost")) { drawn.delete("lost"); trouble(""); }
  } catch {
    drawn.set("lost", true);
    return trouble("The server does not answer: start sv4d app again; runs that were under way can go on.");
  }
  $("file").accept = known.suffixes.join(",");
  $("kinds").textContent = `${known.suffixes.join(" ")}, at most ${size(known.max_bytes)}`;
  fill("matting", known.mattings, () => known.mattings.map((name) => element("option", { value: name }, MATTINGS[name] || name)));
  const changed = wanted !== shown;
  shown = known.jobs.some((job) => job.id === wanted) ? wanted : null;
  $("job").hidden = !shown;
  $("drop").classList.toggle("small", Boolean(shown));
  $("invitation").textContent = shown ? "Drop another video, or choose one" : "Drop a video here, or choose one";
  showList();
  if (!shown) {
    document.title = "sv4d: a video becomes a 4D object";
    if (wanted) { trouble("This run is no longer here."); history.replaceState(null, "", "."); }
    return;
  }
  try {
    const job = await ask(`api/jobs/${shown}`);
    if (job.id !== shown) return;
    if (changed) {
      $("matting").value = job.matting;
      $("framing").value = job.crop;
    }
    showJob(job);
    if (changed) $("main").focus({ preventScroll: true });
  } catch (error) { trouble(error.message); }
}
function look() { return act("look", { matting: $("matting").value, crop: $("framing").value }); }
$("choices").onchange = look; // at once, so that a run never starts with another choice than the one that is shown
addEventListener("hashchange", () => { trouble(""); refresh(); });
(async function forever() {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((done) => setTimeout(done, 1000));
  }
})();
