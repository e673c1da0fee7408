"""The chat page, in Gradio: a chat, all models side by side, and the model's card."""
