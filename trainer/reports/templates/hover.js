// The values under the pointer, for every figure that brings some.
for (const figure of document.querySelectorAll("figure[data-values]")) {
  const values = JSON.parse(figure.dataset.values), svg = figure.querySelector("svg");
  const line = document.createElementNS(svg.namespaceURI, "line");
  const tip = Object.assign(document.createElement("div"), {className: "tip", hidden: true});
  line.setAttribute("y1", values.top);
  line.setAttribute("y2", values.bottom);
  line.style.stroke = "var(--soft)";
  line.style.display = "none";
  svg.append(line);
  figure.append(tip);

  const nearest = (points, x) =>
    points.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);
  const hide = () => { tip.hidden = true; line.style.display = "none"; };
  const show = (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const share = (place.x - values.left) / (values.right - values.left);
    if (share < -.03 || share > 1.03) return hide();
    const found = values.series.map((one) => [one, nearest(one.points, values.low + share * (values.high - values.low))]);
    const at = nearest(found.map(([, point]) => point), values.low + share * (values.high - values.low))[0];
    const x = values.left + (at - values.low) / (values.high - values.low) * (values.right - values.left);
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    line.style.display = "";
    const rows = found.map(([one, point]) => {
      const row = document.createElement("div"), name = document.createElement("span");
      const isThere = Math.abs(point[0] - at) < .01 * (values.high - values.low);
      name.textContent = isThere ? one.label : `${one.label} (${values.name} ${point[0]})`;
      name.style.color = `var(${one.colour})`;
      row.append(name, String(point[1]));
      return row;
    });
    tip.replaceChildren(`${values.name} ${at}`, ...rows);
    tip.hidden = false;
    const frame = figure.getBoundingClientRect(), pointer = event.clientX - frame.left;
    const left = pointer + 14 + tip.offsetWidth > frame.width ? pointer - tip.offsetWidth - 14 : pointer + 14;
    tip.style.left = `${Math.max(left, 0)}px`;
    tip.style.top = `${Math.max(event.clientY - frame.top - tip.offsetHeight - 10, 0)}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
