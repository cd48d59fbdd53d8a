// OpenAI's client for JavaScript: text, a stream, an image, a tool and an object.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY });
const model = "tiny";
const hello = [{ role: "user", content: "Hello" }];
const imageQuestion = [
  {
    role: "user",
    content: [
      { type: "image_url", image_url: { url: process.env.IMAGE_URL } },
      { type: "text", text: "What colour is this?" },
    ],
  },
];

const completion = await client.chat.completions.create({ model, messages: hello });

let streamed = "";
for await (const chunk of await client.chat.completions.create({ model, messages: hello, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}

const imageCompletion = await client.chat.completions.create({ model, messages: imageQuestion });

const toolCompletion = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "What is the weather in Paris?" }],
  tools: [
    {
      type: "function",
      function: {
        name: "get_weather",
        description: "Get the current weather in a city.",
        parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
      },
    },
  ],
});
const calls = toolCompletion.choices[0].message.tool_calls;

const parsed = await client.chat.completions.parse({
  model,
  messages: [{ role: "user", content: "Extract the person: Ada is 36 years old." }],
  response_format: zodResponseFormat(z.object({ name: z.string(), age: z.number() }), "person"),
});

console.log(
  JSON.stringify({
    text: completion.choices[0].message.content,
    streamed,
    image: imageCompletion.choices[0].message.content,
    tool: calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]),
    object: parsed.choices[0].message.parsed,
  }),
);
