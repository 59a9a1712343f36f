for (const section of document.querySelectorAll(".samples")) {
  const search = section.querySelector("input");
  const label = section.querySelector("select");
  const count = section.querySelector("output");
  const samples = [...section.querySelectorAll(".sample")];
  const texts = samples.map((sample) => sample.textContent.toLowerCase());
  const update = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    samples.forEach((sample, k) => {
      const fits =
        (!label.value || sample.dataset.label === label.value) &&
        words.every((word) => texts[k].includes(word));
      sample.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} shown`;
  };
  search.addEventListener("input", update);
  label.addEventListener("change", update);
}
