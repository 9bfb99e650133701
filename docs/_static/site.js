// A click on a picture shows it as large as the window allows; a second click in its own pixels; a third closes it.
document.addEventListener("DOMContentLoaded", () => {
  const box = Object.assign(document.createElement("dialog"), {className: "zoom"});
  const picture = box.appendChild(document.createElement("img"));
  document.body.append(box);
  const close = () => { box.classList.remove("full"); box.close(); };
  picture.addEventListener("click", () => {
    const larger = picture.naturalWidth > picture.clientWidth;
    if (larger && box.classList.toggle("full")) return;
    close();
  });
  box.addEventListener("click", (event) => { if (event.target === box) close(); });
  for (const img of document.querySelectorAll(".bd-article img")) {
    if (img.closest("a")) continue;
    img.addEventListener("click", () => {
      Object.assign(picture, {src: img.src, alt: img.alt});
      box.showModal();
    });
  }
});
