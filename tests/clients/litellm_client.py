"""LiteLLM's `completion`, with its prefix for servers with OpenAI's protocol: text, a stream, an image and a tool."""

import json
import os
from typing import Any

# Otherwise LiteLLM downloads a list of prices when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

MODEL = "openai/tiny"
SERVER = {"api_base": os.environ["BASE_URL"], "api_key": os.environ["API_KEY"]}


def ask(content: Any, **fields: Any) -> Any:
    """Return LiteLLM's response."""
    return litellm.completion(MODEL, messages=[{"role": "user", "content": content}], **SERVER, **fields)


image_response = ask(
    [
        {"type": "image_url", "image_url": {"url": os.environ["IMAGE_URL"]}},
        {"type": "text", "text": "What colour is this?"},
    ]
)
tool_response = ask(
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
calls = [call.function for call in tool_response.choices[0].message.tool_calls]

print(
    json.dumps(
        {
            "text": ask("Hello").choices[0].message.content,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in ask("Hello", stream=True)),
            "image": image_response.choices[0].message.content,
            "tool": [[call.name, json.loads(call.arguments)] for call in calls],
        }
    )
)
