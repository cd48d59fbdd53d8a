"""Anthropic's client: messages, a stream, an image and a tool.

`auth_token` sends the key as `Authorization: Bearer`, which RunPod requires. The worker also accepts `x-api-key`.
"""

import json
import os

from anthropic import Anthropic

# The client appends /v1/messages itself.
client = Anthropic(base_url=os.environ["BASE_URL"].removesuffix("/v1"), auth_token=os.environ["API_KEY"])
MODEL = "tiny"

message = client.messages.create(model=MODEL, max_tokens=40, messages=[{"role": "user", "content": "Hello"}])
text = "".join(block.text for block in message.content if block.type == "text")

with client.messages.stream(model=MODEL, max_tokens=40, messages=[{"role": "user", "content": "Hello"}]) as stream:
    streamed = "".join(stream.text_stream)

image_message = client.messages.create(
    model=MODEL,
    max_tokens=40,
    messages=[
        {
            "role": "user",
            "content": [
                {
                    "type": "image",
                    "source": {
                        "type": "base64",
                        "media_type": "image/png",
                        "data": os.environ["IMAGE_URL"].partition(",")[2],
                    },
                },
                {"type": "text", "text": "What colour is this?"},
            ],
        }
    ],
)

tool_message = client.messages.create(
    model=MODEL,
    max_tokens=60,
    messages=[{"role": "user", "content": "What is the weather in Paris?"}],
    tools=[
        {
            "name": "get_weather",
            "description": "Get the current weather in a city.",
            "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        }
    ],
)

print(
    json.dumps(
        {
            "text": text,
            "streamed": streamed,
            "image": "".join(block.text for block in image_message.content if block.type == "text"),
            "tool": [[block.name, block.input] for block in tool_message.content if block.type == "tool_use"],
        }
    )
)
