"""How the page looks: a picture book on warm paper. Nothing is fetched: Gradio ships the font."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.themes.utils import colors, fonts, sizes

ABSENT = "not on this model"
"""The end of a choice's label that greys it out."""
FAVICON = Path(__file__).parents[2] / "assets" / "examples" / "icon.png"


def theme() -> gr.themes.Base:
    """Rounded, warm, readable in the light and in the dark."""
    family = [fonts.LocalFont("Quicksand", (400, 700)), fonts.Font("sans-serif")]
    base = gr.themes.Soft(
        primary_hue=colors.orange, secondary_hue=colors.amber, neutral_hue=colors.stone, font=family,
        font_mono=[fonts.Font("monospace")], radius_size=sizes.radius_lg, text_size=sizes.text_md,
    )  # fmt: skip
    return base.set(
        body_background_fill="#fdf6ea",
        body_background_fill_dark="#1d1a17",
        body_text_color_subdued="#6b645c",
        body_text_color_subdued_dark="#b5aca2",
        color_accent="#c2410c",
        slider_color="#c2410c",
        slider_color_dark="#fb923c",
        checkbox_border_color="#8a7f74",
        checkbox_background_color_selected="#c2410c",
        checkbox_border_color_selected="#c2410c",
        input_placeholder_color="#6b645c",
        input_placeholder_color_dark="#b5aca2",
        accordion_text_color="#7a4a2b",
        accordion_text_color_dark="#f3cfa6",
        block_border_width="1px",
        block_label_background_fill="#fffaf2",
        block_label_background_fill_dark="#2b2622",
        block_label_text_color="#7a4a2b",
        block_label_text_color_dark="#f3cfa6",
        block_title_background_fill="transparent",
        block_title_text_color="#7a4a2b",
        block_title_text_color_dark="#f3cfa6",
        block_title_padding="0",
        block_info_text_color="#6b645c",
        block_info_text_color_dark="#b5aca2",
        input_background_fill="#fffdf9",
        block_shadow="none",
        button_primary_background_fill="#c8431a",
        button_primary_background_fill_hover="#a93512",
        button_primary_background_fill_dark="#c8431a",
        button_primary_background_fill_hover_dark="#a93512",
        button_primary_text_color="white",
        block_label_text_weight="700",
        block_title_text_weight="700",
    )


DROPS = """
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => {
  const box = document.querySelector(".dg-drop input[type=file]");
  const file = event.dataTransfer && event.dataTransfer.files[0];
  if (event.defaultPrevented || !box || !file || file.type !== "image/png") return;
  event.preventDefault();
  const list = new DataTransfer();
  list.items.add(file);
  box.files = list.files;
  box.dispatchEvent(new Event("change", { bubbles: true }));
});
"""
"""A PNG dropped where nothing else takes it goes to the box that brings settings back."""

_PAGE = 'stroke="#3d3a4b" stroke-width="3" stroke-linejoin="round"'
HEADER = f"""
<header class="dg-head">
  <svg viewBox="0 0 120 72" role="img" aria-label="An open picture book with a ball and a star">
    <path d="M60 66C48 56 24 54 6 58V14c18-4 42-2 54 8z" fill="#fff" {_PAGE}/>
    <path d="M60 66c12-10 36-12 54-8V14c-18-4-42-2-54 8z" fill="#22305f" {_PAGE}/>
    <circle cx="33" cy="36" r="11" fill="#2f7de1"/>
    <path d="M86 20l4.2 9.2 10 1.1-7.4 6.9 2 9.9-8.8-4.9-8.8 4.9 2-9.9-7.4-6.9 10-1.1z" fill="#ffc43d"/>
  </svg>
  <div>
    <h1>diffgraft</h1>
    <p>Techniques that need no training, grafted onto a diffusion pipeline and taken off without a trace.</p>
  </div>
</header>
"""

# pixi-target: in a canvas of an odd width the picture stands on half pixels, and white shows beside it.
CSS = f"""
.dg-techniques li[aria-label$="{ABSENT}"] {{ opacity: .55; cursor: not-allowed; }}
.dg-absent > button, .dg-absent > * > button {{ opacity: .55; }}
""" + """
.gradio-container { max-width: 1180px !important; width: 100%; margin: 0 auto; }
.gradio-container .grid-wrap { min-height: 0 !important; height: auto !important; padding-top: 44px !important; }
.gradio-container .caption-label { font-size: .8rem; max-width: 96%; }
.gradio-container .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.gradio-container .label-wrap span { font-weight: 700; }
.gradio-container .gr-accordion .form { border: 0; background: none; gap: 16px; }
.gradio-container .gr-accordion .form > .block { padding: 0; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container .under-label { padding-top: 40px !important; }
.gradio-container .empty.large { flex-direction: column; gap: 6px; }
.gradio-container .empty.large::after { content: "Nothing here yet"; font-size: .85rem; opacity: .8; }
.gradio-container .table-container * { font-family: var(--font) !important; }
.gradio-container .table-container .label p { font-weight: 700; color: var(--block-title-text-color); }
.gradio-container footer .divider { display: none; }
.gradio-container :disabled:is(input, textarea) { opacity: .45 !important; cursor: not-allowed; }
.gradio-container :is(.seed, .report) textarea:disabled { opacity: 1 !important; cursor: auto; }
.gradio-container .image-container .pixi-target { width: round(down, 100%, 2px); }
.dg-model input { text-overflow: ellipsis; }
.gradio-container .dg-drop button { padding-top: 20px; }
.gradio-container .cm-line span { color: inherit !important; }
.dark .gradio-container button.secondary:disabled { background: #35302b !important; color: #b5aca2 !important; }
.dark { --color-accent: #fb923c !important; }
.dg-head { display: flex; gap: 18px; align-items: center; }
.dg-head svg { width: 96px; flex: none; }
.dg-head h1 { margin: 0 !important; font-size: 2rem !important; line-height: 1.1; letter-spacing: -.01em; }
.dg-head p { margin: 4px 0 0; opacity: .8; }
.dg-note { padding: 10px 14px; border-left: 4px solid #ffc43d; border-radius: 8px; background: #ffc43d2a; }
.dg-top { align-items: center; }
.dg-top .form { border: 0; background: none; max-width: 380px; margin-left: auto; }
.dg-legend { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 0; font-size: .85rem; }
.dg-legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: 5px; }
.dg-look { display: flex; gap: 14px; align-items: center; padding: 10px 14px; border-radius: 12px; }
.dg-look { background: #ffc43d2a; }
.gradio-container .dg-look-place:not(:has(.dg-look)) { display: none; }
.dg-look img { width: 128px; height: 128px; border-radius: 8px; }
.dg-look p { margin: 0; }
.dg-curve figure { margin: 0; }
.dg-curve svg { max-width: 100%; height: auto; }
.gradio-container .dg-strip .grid-container { grid-template-columns: repeat(auto-fill, 92px) !important; }
.gradio-container .dg-seeds .grid-container { grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)) !important; }
.gradio-container .dg-strip .empty { min-height: 116px !important; padding-top: 32px; }
.gradio-container .dg-strip .caption-label { font-size: .62rem; padding: 1px 4px; }
.report textarea { font-family: monospace; font-size: .8rem; }
@media (max-width: 480px) {
  .gradio-container .main.fillable { padding: 12px !important; }
  .gradio-container .caption-label { font-size: .68rem; padding: 2px 5px; }
  .gradio-container .table-container table * { font-size: .7rem !important; padding-inline: 3px !important; }
  .gradio-container .tab-container button { padding: 0 7px !important; font-size: .84rem !important; }
  .dg-top > * { flex: 1 1 100% !important; }
  .dg-top .form { max-width: none; }
  .dg-head { gap: 12px; }
  .dg-head svg { width: 60px; }
  .dg-head h1 { font-size: 1.5rem !important; }
  .dg-head p { font-size: .9rem; line-height: 1.3; }
}
"""
