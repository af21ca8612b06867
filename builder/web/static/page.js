// What the page does beyond forms and links; without it, everything still works.
"use strict";

// A slider says its value.
for (const output of document.querySelectorAll("output[for]")) {
  const slider = document.getElementById(output.htmlFor.value);
  slider?.addEventListener("input", () => { output.value = slider.value; });
}

// The weight of the whole is that of all blocks nobody has moved yet.
for (const slider of document.querySelectorAll("input[type=range]")) {
  slider.addEventListener("input", () => { slider.dataset.moved = "1"; });
}
for (const base of document.querySelectorAll(".weights > .field input[type=number]")) {
  let before = base.value;
  base.addEventListener("input", () => {
    for (const slider of base.closest(".weights").querySelectorAll("input[type=range]")) {
      if (!slider.dataset.moved && Number(slider.value) === Number(before)) {
        slider.value = base.value;
        slider.nextElementSibling.value = slider.value;
      }
    }
    before = base.value;
  });
}

// A form is sent once.
for (const form of document.querySelectorAll("form[method=post]")) {
  form.addEventListener("submit", () => {
    setTimeout(() => { for (const button of form.querySelectorAll("button")) button.disabled = true; });
  });
}
addEventListener("pageshow", (event) => {
  if (event.persisted) for (const button of document.querySelectorAll("button")) button.disabled = false;
});

// How far a job is.
const tasks = document.getElementById("tasks");
if (tasks) {
  const state = document.getElementById("state");
  const heard = document.getElementById("progress");
  let spoken = -1;
  const show = (data) => {
    const rows = data.tasks.map(({ task, done, total, told }) => {
      const row = document.createElement("p");
      const label = document.createElement("label");
      const name = document.createElement("span");
      const bar = document.createElement("progress");
      const of = document.createElement("small");
      row.className = "task";
      name.textContent = task;
      if (total) { bar.max = total; bar.value = Math.min(done, total); }
      of.textContent = told;
      label.append(name, bar);
      row.append(label, of);
      return row;
    });
    tasks.replaceChildren(...rows);
    if (data.state === "running") state.textContent = "under way";
    // Ten words in all, not a word for every step.
    const sum = (key) => data.tasks.reduce((all, task) => all + task[key], 0);
    const tenth = sum("total") ? Math.floor(10 * sum("done") / sum("total")) : 0;
    if (tenth !== spoken && data.tasks.length) {
      spoken = tenth;
      heard.textContent = `${data.tasks[0].task}, ${10 * tenth} percent`;
    }
  };
  const events = new EventSource(tasks.dataset.events);
  events.addEventListener("progress", (event) => show(JSON.parse(event.data)));
  events.addEventListener("over", () => { events.close(); location.reload(); });
}

// What is wrong with a recipe, as it is written.
const recipe = document.getElementById("recipe");
if (recipe) {
  const problems = document.getElementById("problems");
  let timer = 0;
  let asked = 0;
  const check = async () => {
    const form = new FormData(recipe.form);
    form.delete("whole");
    const number = ++asked;
    try {
      const answer = await fetch(recipe.dataset.check, { method: "POST", body: new URLSearchParams(form) });
      const said = await answer.text();
      if (number !== asked || !answer.ok) return;
      problems.innerHTML = said;  // made by the server, which escapes all that is not its own
      recipe.setAttribute("aria-invalid", String(problems.querySelector(".problem.error") !== null));
    } catch { /* the server is gone: what was said stays */ }
  };
  recipe.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(check, 400);
  });
  problems.addEventListener("click", (event) => {
    const to = event.target.closest("[data-line]");
    if (!to) return;
    const before = recipe.value.split("\n").slice(0, to.dataset.line - 1);
    const start = before.reduce((sum, line) => sum + line.length + 1, 0) + Number(to.dataset.column) - 1;
    recipe.focus();
    recipe.setSelectionRange(start, start);
    const height = Number.parseFloat(getComputedStyle(recipe).lineHeight);
    recipe.scrollTop = Math.max(0, (to.dataset.line - 4) * height);
  });
}
