// The AI SDK with its provider for servers with OpenAI's protocol: text, a stream, an image, a tool and an object.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const endpoint = createOpenAICompatible({
  name: "runpod",
  baseURL: process.env.BASE_URL,
  apiKey: process.env.API_KEY,
  supportsStructuredOutputs: true,
});
const model = endpoint("tiny");
const { text } = await generateText({ model, prompt: "Hello" });

let streamed = "";
for await (const part of streamText({ model, prompt: "Hello" }).textStream) {
  streamed += part;
}

const imageResult = await generateText({
  model,
  messages: [
    {
      role: "user",
      content: [
        { type: "file", mediaType: "image", data: process.env.IMAGE_URL },
        { type: "text", text: "What colour is this?" },
      ],
    },
  ],
});

const { toolCalls } = await generateText({
  model,
  prompt: "What is the weather in Paris?",
  tools: {
    get_weather: tool({
      description: "Get the current weather in a city.",
      inputSchema: z.object({ city: z.string() }),
    }),
  },
});

const { output } = await generateText({
  model,
  prompt: "Extract the person: Ada is 36 years old.",
  output: Output.object({ schema: z.object({ name: z.string(), age: z.number() }) }),
});

console.log(
  JSON.stringify({
    text,
    streamed,
    image: imageResult.text,
    tool: toolCalls.map((call) => [call.toolName, call.input]),
    object: output,
  }),
);
