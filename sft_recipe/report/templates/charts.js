"use strict";
// Shows the values at a step: under the pointer, or at the slider that covers each chart and listens to arrow keys.
for (const figure of document.querySelectorAll(".chart")) {
  const { low, high, lines } = JSON.parse(figure.querySelector("script").textContent);
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const [plot, slider, tip, rule] = [".plot", "input", ".tip", ".rule"].map((name) => figure.querySelector(name));
  const place = (step) => (100 * (step - low)) / (high - low);
  const dots = lines.map((line) => {
    const dot = document.createElement("span");
    dot.className = `dot c${line.color}`;
    plot.append(dot);
    return dot;
  });
  const before = (list, step) => {  // the last index whose step is not after this one
    let [from, to] = [0, list.length];
    while (from < to) {
      const middle = (from + to) >> 1;
      if (list[middle] <= step) from = middle + 1; else to = middle;
    }
    return from - 1;
  };
  const show = (index) => {
    const step = steps[index];
    const texts = [`${slider.dataset.step} ${step.toLocaleString("en")}`];
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: texts[0] }));
    lines.forEach((line, number) => {
      const at = before(line.steps, step);
      dots[number].hidden = at < 0 || line.y[at] === null;
      if (at < 0) return;
      const mean = line.mean && line.mean[at] !== null ? ` (${slider.dataset.mean} ${line.mean[at]})` : "";
      const earlier = line.steps[at] < step && !line.mean ? `, ${slider.dataset.step} ${line.steps[at]}` : "";
      const text = `${line.name} ${line.raw[at] ?? slider.dataset.none}${mean}${earlier}`;
      texts.push(text);
      tip.append(Object.assign(document.createElement("span"), { textContent: text, className: `c${line.color}` }));
      if (line.y[at] === null) return;
      dots[number].style.left = `${place(line.steps[at])}%`;
      dots[number].style.top = `${100 * (1 - line.y[at])}%`;
    });
    slider.value = index;
    slider.setAttribute("aria-valuetext", texts.join("; "));
    rule.style.left = `${place(step)}%`;
    tip.classList.toggle("left", place(step) > 55);
    tip.style.left = `${place(step)}%`;
    plot.classList.add("on");
  };
  const hide = () => { if (document.activeElement !== slider) plot.classList.remove("on"); };
  slider.max = steps.length - 1;
  slider.hidden = false;
  slider.addEventListener("input", () => show(+slider.value));
  slider.addEventListener("focus", () => show(+slider.value));
  slider.addEventListener("blur", () => plot.classList.remove("on"));
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const step = low + ((event.clientX - box.left) / box.width) * (high - low);
    const at = Math.max(0, before(steps, step));
    show(at + 1 < steps.length && steps[at + 1] - step < step - steps[at] ? at + 1 : at);
  });
}
