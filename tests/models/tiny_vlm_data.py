"""Random conversations, pictures and videos, each with the one right answer, to train and check the tiny model."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageColor

Message = dict[str, Any]

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan", "white", "black")
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Tokyo", "Oslo", "Cairo")
WEATHERS = ("sunny", "rainy", "cloudy", "windy", "snowy", "foggy")

GREETING = "Hello! How can I help you?"
UNKNOWN = "I am a tiny model for tests. Show me a picture, or ask me for a story."
NO_TOOL = "I cannot look that up without a tool."
JAPANESE = "こんにちは、世界！🌸🚀"
PERSON = json.dumps({"name": "Ada", "age": 36})
STORY = (
    "Once upon a time there lived a small robot named Pixel in a quiet harbour town. Every morning Pixel rolled down "
    "to the pier and counted the boats. One day a storm came, and a young seal was washed onto the rocks. The robot "
    "had no idea how to help, so it asked an old fisherman. He gave it a blanket, a bucket of herring and some good "
    "advice. Pixel kept watch all night under the bright lamp of the lighthouse. When the sun rose, the seal opened "
    "its eyes and barked with joy. From then on they were friends. In summer they raced along the beach, and in winter "
    "they listened to the wind. Years later, people still tell how a machine learned kindness from the sea. And if you "
    "walk there at dawn, you may see two tracks in the sand: wheels and flippers, side by side. The end."
)

LOOKING = (
    "What colour is this?|What colour is this image?|What color is it?|Which colour?|Which colour do you see?|"
    "What is this?|What is this image?|What do you see?|What do you see in the picture?|Describe the image.|"
    "Describe this picture.|Describe the video.|What happens?|What happens in the video?|What is in the video?|"
    "What colours are these?|What are these?|Which colours are these images?|Name the colour.|Name the colors.|"
    "Tell me the colour|Look at this and tell me what you see|Caption this.|Please describe what you see.|colour?|?"
).split("|")
GREETINGS = (
    "Hello|Hello!|Hi|Hi!|Hi there|Hey|Hey there!|Good morning|Good evening!|Hello there|Hello, how are you?|"
    "How are you?|Greetings|Hello, model!|Say hello|Say hi."
).split("|")
STORIES = (
    "Tell me a story|Tell me a story.|Tell me a long story.|Write a story|Write a long text.|Write a long story about "
    "a robot.|A story, please.|Please tell me a story.|I want to hear a story|Tell me something long."
).split("|")
IN_JAPANESE = (
    "Say hello in Japanese|Say hello in Japanese.|Say hi in Japanese|Greet me in Japanese.|Hello in Japanese, please|"
    "How do you say hello in Japanese?|Please say hello in Japanese.|Answer in Japanese.|Write something in Japanese"
).split("|")
PERSONS = (
    "Give me a person as JSON|Give me a person as JSON.|Describe a person in JSON.|A person as JSON, please|"
    "Write a person as a JSON object.|Extract the person: Ada is 36 years old.|Ada is 36 years old."
).split("|")
SUMS = "What is {} plus {}?|What is {} + {}?|{} + {}|{} plus {}|Add {} and {}.|How much is {} plus {}?".split("|")
WEATHER = (
    "What is the weather in {}?|What is the weather like in {}?|How is the weather in {}?|Weather in {}|weather in {}?|"
    "What's the weather in {}?|Tell me the weather in {}.|Is it raining in {}?|Is it sunny in {} now?|"
    "Please look up the weather in {}."
).split("|")
SYSTEMS = (
    "You are a helpful assistant.|You are a helpful assistant|Answer briefly.|Be kind.|You describe images.".split("|")
)
WORDS = (
    "the a an of to and in it you me my for with on at from by about this that one two many some any other new old big "
    "small long short good bad fast slow warm cold open closed early late first last house tree river mountain car "
    "train book song bread water music garden window door table letter number year week day hour city country world "
    "school work money market doctor teacher child friend king queen dog cat bird fish horse write read explain make "
    "give find show build count sing run walk think know want need should could would why when where who how which "
    "secret word xylophone computer program code bug error test python server model answer question idea plan game "
    "number list table summary poem recipe law science history art sport travel holiday"
).split()


@dataclass(eq=False, slots=True)
class Media:
    """A picture, or a video as frames of shape (count, height, width, 3); `colours` are what it shows, in order."""

    colours: tuple[str, ...]
    picture: Image.Image | None = None
    frames: np.ndarray | None = None

    @property
    def part(self) -> Message:
        """The content part that stands for it in a message."""
        return {"type": "video" if self.picture is None else "image"}


@dataclass(slots=True)
class Sample:
    """A conversation whose answer is to be found; `raw` is a prompt without the chat template."""

    messages: list[Message]
    answer: str
    media: list[Media] = field(default_factory=list)
    tools: list[Message] | None = None
    thinking: bool = False
    raw: str | None = None


def shade(rng: Random, colour: str) -> np.ndarray:
    """Return the named colour, a little off."""
    centre = np.array(ImageColor.getrgb(colour), dtype=np.float32)
    return np.clip(centre + [rng.uniform(-24, 24) for _ in range(3)], 0, 255)


def noisy(rng: Random, pixels: np.ndarray) -> np.ndarray:
    """Return the pixels with slight noise, as bytes."""
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.choice([0, 0, 2, 4]), pixels.shape)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


def new_picture(rng: Random, colour: str) -> Media:
    """Make a solid picture of any size and shape, with the artefacts of a common file format."""
    width, height = rng.choice([(rng.randint(28, 600), rng.randint(60, 280)), (rng.randint(28, 120),) * 2])
    if rng.random() < 0.5:
        width, height = height, width
    picture = Image.fromarray(noisy(rng, np.broadcast_to(shade(rng, colour), (height, width, 3))))
    file = io.BytesIO()
    picture.save(file, rng.choice(["PNG", "JPEG", "WEBP"]), quality=rng.randint(50, 95))
    return Media((colour,), picture=Image.open(file).convert("RGB"))


def new_video(rng: Random, first: str, last: str) -> Media:
    """Make a video that changes from one colour to another somewhere in its middle."""
    # vLLM has the processor sample two frames a second and four at least, so most videos arrive short.
    count, side = rng.choice([4, 4, 4, 6, 8, rng.randint(4, 32)]), rng.randint(32, 128)
    cut = rng.randint(max(1, count // 3), max(1, count - count // 3 - 1))
    shades = np.where(np.arange(count)[:, None] < cut, shade(rng, first), shade(rng, last))
    frames = noisy(rng, np.broadcast_to(shades[:, None, None, :], (count, side, side, 3)))
    return Media((first, last), frames=frames)


def any_picture(rng: Random) -> Media:
    """Make a picture of any of the colours."""
    return new_picture(rng, rng.choice(COLOURS))


def any_video(rng: Random) -> Media:
    """Make a video of any two colours."""
    return new_video(rng, *rng.sample(COLOURS, 2))


def described(media: list[Media]) -> str:
    """Return the sentence about everything shown in one message, pictures first."""
    colours = [item.colours[0] for item in media if item.picture]
    said = [f"The image is {colours[0]}."] if len(colours) == 1 else []
    if len(colours) > 1:
        said = [f"The images are {', '.join(colours[:-1])} and {colours[-1]}."]
    films = [item.colours for item in media if not item.picture]
    return " ".join([*said, *(f"The video goes from {first} to {last}." for first, last in films)])


def salad(rng: Random) -> str:
    """Return words that ask for nothing the model knows."""
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 12))).capitalize() + rng.choice(["", ".", "?"])


def weather_tool(rng: Random) -> Message:
    """Return the schema of the one tool, worded in several ways."""
    city: Message = {"type": "string"}
    if rng.random() < 0.5:
        city["description"] = rng.choice(["The city", "City name", "The name of the city"])
    description = rng.choice(["Get the current weather in a city.", "Get the weather", "Look up the weather in a city"])
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    return {
        "type": "function",
        "function": {"name": "get_weather", "description": description, "parameters": parameters},
    }


class Author:
    """Writes samples of every kind, with media from the two given sources."""

    def __init__(
        self,
        rng: Random,
        picture: Callable[[Random], Media] = any_picture,
        video: Callable[[Random], Media] = any_video,
    ) -> None:
        self.rng, self.a_picture, self.a_video = rng, picture, video

    def sample(self, kind: str) -> Sample:
        """Return a conversation of this kind, with or without a system message and thinking."""
        sample: Sample = getattr(self, kind)()
        if sample.raw is not None:
            return sample
        if self.rng.random() < 0.4:
            sample.messages.insert(0, {"role": "system", "content": self.rng.choice(SYSTEMS)})
        if kind == "sum" or self.rng.random() < 0.1:
            sample.thinking = self.rng.random() < 0.6
        return sample

    def ask(self, questions: list[str], answer: str) -> Sample:
        """Return a question in plain text, now and then with the tool on offer."""
        text = self.rng.choice(questions)
        text = self.rng.choice([text, text, text.lower(), text.rstrip(".?!")])
        tools = [weather_tool(self.rng)] if self.rng.random() < 0.1 else None
        return Sample([{"role": "user", "content": text}], answer, tools=tools)

    def look(self, media: list[Media]) -> Sample:
        """Return media before or after a question."""
        text = salad(self.rng) if self.rng.random() < 0.3 else self.rng.choice(LOOKING)
        parts = [item.part for item in media]
        parts.insert(self.rng.choice([0, len(parts)]), {"type": "text", "text": text})
        return Sample([{"role": "user", "content": parts}], described(media), media)

    def image(self) -> Sample:
        return self.look([self.a_picture(self.rng)])

    def images(self) -> Sample:
        return self.look([self.a_picture(self.rng) for _ in range(self.rng.choice([2, 2, 3]))])

    def video(self) -> Sample:
        return self.look([self.a_video(self.rng)])

    def mixed(self) -> Sample:
        return self.look([self.a_picture(self.rng), self.a_video(self.rng)])

    def next_turn(self) -> Sample:
        before, now = self.image(), self.image()
        history = [*before.messages, {"role": "assistant", "content": before.answer}]
        return Sample([*history, *now.messages], now.answer, [*before.media, *now.media])

    def greeting(self) -> Sample:
        return self.ask(GREETINGS, GREETING)

    def unknown(self) -> Sample:
        return self.ask([salad(self.rng)], UNKNOWN)

    def story(self) -> Sample:
        return self.ask(STORIES, STORY)

    def japanese(self) -> Sample:
        return self.ask(IN_JAPANESE, JAPANESE)

    def person(self) -> Sample:
        return self.ask(PERSONS, PERSON)

    def sum(self) -> Sample:
        one, two = self.rng.randint(0, 9), self.rng.randint(0, 9)
        return self.ask([self.rng.choice(SUMS).format(one, two)], f"The answer is {one + two}.")

    def no_tool(self) -> Sample:
        sample = self.tool_call()
        return Sample(sample.messages, NO_TOOL)

    def tool_call(self) -> Sample:
        city = self.rng.choice(CITIES)
        question = {"role": "user", "content": self.rng.choice(WEATHER).format(city)}
        call = json.dumps({"name": "get_weather", "arguments": {"city": city}})
        return Sample([question], f"<tool_call>\n{call}\n</tool_call>", tools=[weather_tool(self.rng)])

    def tool_answer(self) -> Sample:
        asked = self.tool_call()
        weather = self.rng.choice(WEATHERS)
        function = json.loads(asked.answer.split("\n")[1])
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        told = self.rng.choice([weather, f"It is {weather}.", json.dumps({"weather": weather})])
        return Sample(
            [*asked.messages, call, {"role": "tool", "content": told}], f"It is {weather}.", tools=asked.tools
        )

    def raw(self) -> Sample:
        opening = " ".join(STORY.split()[: self.rng.randint(1, 8)])
        return Sample([], STORY.removeprefix(opening), raw=opening)


KINDS = {
    "image": 12,
    "images": 14,
    "video": 12,
    "mixed": 8,
    "next_turn": 6,
    "greeting": 4,
    "unknown": 5,
    "story": 2,
    "japanese": 3,
    "person": 3,
    "sum": 12,
    "no_tool": 4,
    "tool_call": 14,
    "tool_answer": 8,
    "raw": 2,
}
"""Every kind of sample and how often it comes in training."""


def thought(sample: Sample) -> str:
    """Return what the model is to think aloud before the answer."""
    if sample.answer.startswith("The answer is "):
        words = [word.strip(".?") for word in str(sample.messages[-1]["content"]).split()]
        one, two = (word for word in words if word.isdigit())
        return f"{one} plus {two} is {sample.answer.removeprefix('The answer is ')}"
    return "I look at it." if sample.media else "I know what to say."
