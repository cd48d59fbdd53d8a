"""LiteLLM's completion, with the prefix of its provider for OpenAI's protocol: text, a stream, an image and a tool."""

import json
import os
from typing import Any

# LiteLLM asks the web for a list of prices when it is imported, unless it is told to take its own.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

MODEL = "openai/tiny"
SERVER = {"api_base": os.environ["BASE_URL"], "api_key": os.environ["API_KEY"]}


def ask(content: Any, **fields: Any) -> Any:
    """Return what the model answers."""
    return litellm.completion(MODEL, messages=[{"role": "user", "content": content}], **SERVER, **fields)


seen = ask(
    [
        {"type": "image_url", "image_url": {"url": os.environ["IMAGE_URL"]}},
        {"type": "text", "text": "What colour is this?"},
    ]
)
used = ask(
    "What is the weather in Paris?",
    tools=[
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Get the current weather in a city.",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
    ],
)
calls = [call.function for call in used.choices[0].message.tool_calls]

print(
    json.dumps(
        {
            "text": ask("Hello").choices[0].message.content,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in ask("Hello", stream=True)),
            "image": seen.choices[0].message.content,
            "tool": [[call.name, json.loads(call.arguments)] for call in calls],
        }
    )
)
