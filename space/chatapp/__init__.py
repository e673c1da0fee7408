"""The chat app's package. Rooms: engine (the exported model), server (queue and API), page (Gradio).

page imports server, server imports engine; never the other way round. serve.py puts the rooms together.
"""

import os

# The libraries read these variables when they are imported. Python runs this file before any module of the package,
# so it is the one place that always comes first.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
