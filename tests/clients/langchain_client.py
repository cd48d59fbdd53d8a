"""LangChain's ChatOpenAI: invoke, stream, an image and a tool."""

import json
import os

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

model = ChatOpenAI(model="tiny", base_url=os.environ["BASE_URL"], api_key=SecretStr(os.environ["API_KEY"]))


def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    return f"It is sunny in {city}."


image_question = HumanMessage(
    [
        {"type": "image_url", "image_url": {"url": os.environ["IMAGE_URL"]}},
        {"type": "text", "text": "What colour is this?"},
    ]
)
calls = model.bind_tools([get_weather]).invoke("What is the weather in Paris?").tool_calls

print(
    json.dumps(
        {
            "text": model.invoke("Hello").text,
            "streamed": "".join(chunk.text for chunk in model.stream("Hello")),
            "image": model.invoke([image_question]).text,
            "tool": [[call["name"], call["args"]] for call in calls],
        }
    )
)
