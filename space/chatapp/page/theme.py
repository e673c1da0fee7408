"""The colours of the page. Each text has a contrast of at least 4.5 to 1 with what stands behind it."""

from pathlib import Path

import gradio as gr

STYLE = Path(__file__).with_name("chat_page.css")
# Gradio's own theme has white text on a pale teal, and grey text on white; neither is readable.
THEME = gr.themes.Soft(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    # Fonts of the reader's machine: the page loads none.
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
).set(
    background_fill_primary="*neutral_50",  # as before; set() forgets it
    color_accent="*primary_700",
    body_text_color="*neutral_800",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    block_label_text_color="*primary_800",
    block_label_background_fill_dark="*primary_800",
    block_title_text_color="*primary_800",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    button_secondary_background_fill_hover_dark="*neutral_600",
    link_text_color="*primary_700",
    link_text_color_hover="*primary_800",
    link_text_color_active="*primary_700",
    link_text_color_visited="*primary_700",
    link_text_color_dark="*primary_300",
    link_text_color_hover_dark="*primary_200",
    link_text_color_active_dark="*primary_300",
    link_text_color_visited_dark="*primary_300",
)
