"""What fine-tuning costs in knowledge: short questions with one right answer, put to the base and to the tuned model.

An answer is right if one of the accepted words stands in its first 48 tokens, decoded greedily.
Run: `python -m bench.knowledge` (a minute; needs models/base/ and models/merged/)
"""

import re

import torch

from stages.common.chat import Chat
from stages.common.generation import greedy_answers
from stages.common.model_files import load_tokenizer
from stages.common.models import load_model
from stages.common.params import read_params
from stages.evaluate import MODELS

TOKENS, BATCH = 48, 24
# Each question, and the words of which one must be in the answer.
QUESTIONS = {
    "What is the capital of France?": ["paris"],
    "What is the capital of Japan?": ["tokyo"],
    "What is the capital of Italy?": ["rome"],
    "What is the capital of Egypt?": ["cairo"],
    "What is the capital of Canada?": ["ottawa"],
    "Which planet is closest to the Sun?": ["mercury"],
    "Which is the largest planet of the solar system?": ["jupiter"],
    "Which planet is called the Red Planet?": ["mars"],
    "What is the chemical symbol of gold?": ["au"],
    "What is the chemical formula of water?": ["h2o", "h₂o"],
    "Which gas do plants take in for photosynthesis?": ["carbon dioxide", "co2", "co₂"],
    "Which gas do we need to breathe?": ["oxygen"],
    "At how many degrees Celsius does water boil at sea level?": ["100"],
    "At how many degrees Celsius does water freeze?": ["0", "zero"],
    "How many days has a leap year?": ["366"],
    "How many hours has a day?": ["24"],
    "How many minutes has an hour?": ["60", "sixty"],
    "How many legs has a spider?": ["8", "eight"],
    "How many sides has a hexagon?": ["6", "six"],
    "How many continents are there?": ["7", "seven"],
    "Who wrote Romeo and Juliet?": ["shakespeare"],
    "Who wrote 1984?": ["orwell"],
    "Who painted the Mona Lisa?": ["leonardo", "da vinci"],
    "Who developed the theory of relativity?": ["einstein"],
    "Who was the first president of the United States?": ["washington"],
    "Who was the first person to walk on the Moon?": ["armstrong"],
    "In which year did the Second World War end?": ["1945"],
    "Which is the longest river of Africa?": ["nile"],
    "Which is the largest ocean of the Earth?": ["pacific"],
    "Which is the highest mountain of the Earth?": ["everest"],
    "On which continent is Brazil?": ["south america"],
    "On which continent is Kenya?": ["africa"],
    "Which language is spoken in Brazil?": ["portuguese"],
    "Which currency does Japan use?": ["yen"],
    "Which organ pumps blood through the body?": ["heart"],
    "Which animal is called the king of the jungle?": ["lion"],
    "What do bees make?": ["honey"],
    "What is the opposite of hot?": ["cold"],
    "What is the past tense of go?": ["went"],
    "What is 7 + 5?": ["12", "twelve"],
}


def is_right(answer: str, accepted: list[str]) -> bool:
    """Whether one of the accepted words stands in the answer, as a word."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer.lower()) for word in accepted)


def main() -> None:
    torch.manual_seed(0)
    prompt = read_params().system_prompt
    system = [{"role": "system", "content": prompt}] if prompt else []
    tokenizer = load_tokenizer(MODELS["tuned"])
    chat = Chat.of(tokenizer)
    prompts = [chat.ids([*system, {"role": "user", "content": question}]) for question in QUESTIONS]
    right: dict[str, set[str]] = {}
    for name, folder in MODELS.items():
        model = load_model(folder, torch.float32).eval()
        answers = greedy_answers(model, tokenizer, prompts, TOKENS, BATCH)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        right[name] = {
            question
            for (question, accepted), text in zip(QUESTIONS.items(), texts, strict=True)
            if is_right(text, accepted)
        }
        print(f"{name}: {len(right[name])} of {len(QUESTIONS)} right", flush=True)
    print("lost by tuning:", *sorted(right["base"] - right["tuned"]), sep="\n  ")
    print("won by tuning:", *sorted(right["tuned"] - right["base"]), sep="\n  ")


if __name__ == "__main__":
    main()
