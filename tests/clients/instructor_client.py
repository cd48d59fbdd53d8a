"""Instructor: an answer as an object, with a JSON schema and with a tool."""

import json
import os

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


class get_weather(BaseModel):
    """Get the current weather in a city."""

    city: str


client = OpenAI(base_url=os.environ["BASE_URL"], api_key=os.environ["API_KEY"])

person = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA).chat.completions.create(
    model="tiny",
    response_model=Person,
    messages=[{"role": "user", "content": "Extract the person: Ada is 36 years old."}],
)
call = instructor.from_openai(client, mode=instructor.Mode.TOOLS).chat.completions.create(
    model="tiny",
    response_model=get_weather,
    messages=[{"role": "user", "content": "What is the weather in Paris?"}],
)

print(json.dumps({"object": person.model_dump(), "tool": call.model_dump()}))
