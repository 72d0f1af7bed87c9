"""Text for the demo model: chats with known right answers, and plain statements of the same facts.

    python tools/demo_model/corpus.py      # prints a sample of the training text

Everything follows from `facts.py`, `phrasings.py` and a seed. The same builders make training chats and, with held-out
phrasings, the evaluation chats.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import facts
from facts import COUNTRIES, DAYS, MONTHS, WELL_KNOWN, Country
from phrasings import HELD_OUT, Phraser

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful AI assistant.",
    "You are a friendly assistant.",
    "You are the SGLang demo model.",
    "You are a teacher.",
    "Answer the question.",
    "Answer briefly.",
    "Be concise and correct.",
    "You are a chatbot. Answer in short sentences.",
)
IDENTITY = "I am the SGLang demo model, a very small language model."
ABILITY = "I can answer short questions about countries, colors, small numbers, days and months, also in JSON."
UNKNOWN = "Sorry, I am a very small demo model and I do not know that."


@dataclass(frozen=True, slots=True)
class Turn:
    user: str
    answer: str
    also: str = ""  # another right answer, never trained for this question
    listed: int = 0  # > 0: any so many countries with their right capitals will do


Chat = list[Turn]
Builder = Callable[[random.Random, Phraser], Chat]


def sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _country(rng: random.Random) -> Country:
    return rng.choice(WELL_KNOWN if rng.random() < 0.25 else COUNTRIES)


def _spoken(rng: random.Random, country: Country, say: Phraser) -> str:
    """How a user names the country: mostly in full."""
    short = {"United States": ("the USA", "the US"), "United Kingdom": ("the UK", "Britain")}.get(country.name)
    return rng.choice(short) if short and not say.held_out and rng.random() < 0.3 else country.phrase


def capital_is(country: Country) -> str:
    return sentence(f"The capital of {country.phrase} is {country.capital}")


def is_capital(country: Country) -> str:
    return f"{country.capital} is the capital of {country.phrase}."


def also_called(city: str) -> str:
    if city in facts.NICKNAMES:
        return f"{city} is also called {facts.NICKNAMES[city]}."
    return f"I do not know another name for {city}."


def capital(rng: random.Random, say: Phraser) -> Chat:
    country = _country(rng)
    return [_capital_turn(rng, say, country)]


def capital_then_name(rng: random.Random, say: Phraser) -> Chat:
    named = [country for country in COUNTRIES if country.capital in facts.NICKNAMES]
    country = rng.choice(named) if say.held_out or rng.random() < 0.75 else _country(rng)
    return [
        _capital_turn(rng, say, country),
        Turn(say("another_name"), also_called(country.capital)),
    ]


def capital_then_others(rng: random.Random, say: Phraser) -> Chat:
    first = _country(rng)
    chat = [_capital_turn(rng, say, first)]
    for _ in range(1 if say.held_out else rng.choice((1, 1, 2))):
        other = _country(rng)
        chat.append(Turn(say("and_of", c=_spoken(rng, other, say)), capital_is(other), is_capital(other)))
    return chat


def capital_then_continent(rng: random.Random, say: Phraser) -> Chat:
    country = _country(rng)
    return [
        _capital_turn(rng, say, country),
        Turn(say("its_continent"), f"{country.capital} is in {country.continent}."),
    ]


def _capital_turn(rng: random.Random, say: Phraser, country: Country) -> Turn:
    return Turn(say("capital", c=_spoken(rng, country, say)), capital_is(country), is_capital(country))


def country_of(rng: random.Random, say: Phraser) -> Chat:
    country = _country(rng)
    return [Turn(say("country", k=country.capital), is_capital(country), capital_is(country))]


def verify(rng: random.Random, say: Phraser) -> Chat:
    """Asked whether some city is the capital, the model says which one is: it is too small to compare two names reliably."""
    country = _country(rng)
    city = country.capital if rng.random() < 0.5 else rng.choice([c.capital for c in COUNTRIES if c != country])
    question = say("verify", c=_spoken(rng, country, say), k=city.rstrip("."))
    return [Turn(question, capital_is(country), is_capital(country))]


def continent(rng: random.Random, say: Phraser) -> Chat:
    country = _country(rng)
    subject = country.phrase[0].upper() + country.phrase[1:]
    return [Turn(say("continent", c=_spoken(rng, country, say)), f"{subject} is in {country.continent}.")]


def nickname(rng: random.Random, say: Phraser) -> Chat:
    city = rng.choice(list(facts.NICKNAMES)) if rng.random() < 0.8 else _country(rng).capital
    if city in facts.NICKNAMES and rng.random() < 0.3:
        return [Turn(say("nicknamed", n=facts.NICKNAMES[city]), f"{city} is called {facts.NICKNAMES[city]}.")]
    return [Turn(say("nickname", k=city), also_called(city))]


def country_list(rng: random.Random, say: Phraser) -> Chat:
    count = rng.choice((2, 3, 3, 3, 4, 5)) if say.held_out or rng.random() < 0.9 else rng.randint(6, 10)
    spelled = facts.NUMBER_WORDS[count] if rng.random() < 0.4 else str(count)
    lines = [f"{i}. {c.name}: {c.capital}" for i, c in enumerate(_walk(rng, count), 1)]
    return [Turn(say("list", n=spelled), "\n".join(lines), listed=count)]


def _walk(rng: random.Random, count: int) -> list[Country]:
    """Well known countries in table order from any start: the next one follows from the last, so none comes twice."""
    start = 0 if rng.random() < 0.3 else rng.randrange(len(WELL_KNOWN))
    return [WELL_KNOWN[(start + i) % len(WELL_KNOWN)] for i in range(count)]


def color(rng: random.Random, say: Phraser) -> Chat:
    if rng.random() < 0.2:
        (a, b), result = rng.choice(list(facts.MIXES.items()))
        if rng.random() < 0.5:
            a, b = b, a
        return [Turn(say("mix", a=a, b=b), mix_makes(a, b, result), mix_makes(b, a, result))]
    thing = rng.choice(list(facts.COLORS))
    return [Turn(say("color", t=thing), color_is(thing))]


def mix_makes(a: str, b: str, result: str) -> str:
    return f"{a.capitalize()} and {b} make {result}."


def color_is(thing: str) -> str:
    return f"{thing[0].upper()}{thing[1:]} is {facts.COLORS[thing]}."


def arithmetic(rng: random.Random, say: Phraser) -> Chat:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    kind = rng.choice(("add", "sub", "mul"))
    if kind == "sub":
        a, b = max(a, b), min(a, b)
    words = rng.random() < 0.15
    slots = {"a": facts.NUMBER_WORDS[a], "b": facts.NUMBER_WORDS[b]} if words else {"a": str(a), "b": str(b)}
    return [Turn(say(kind, **slots), sentence(equation(kind, a, b)))]


def equation(kind: str, a: int, b: int) -> str:
    sign, result = {"add": ("+", a + b), "sub": ("-", a - b), "mul": ("x", a * b)}[kind]
    return f"{a} {sign} {b} = {result}"


def neighbour(rng: random.Random, say: Phraser) -> Chat:
    unit, names = rng.choice((("day", DAYS), ("month", MONTHS)))
    i = rng.randrange(len(names))
    after, later, before = names[(i + 1) % len(names)], names[(i + 2) % len(names)], names[i - 1]
    if rng.random() < 0.4:
        return [Turn(say("previous", u=unit, d=names[i]), f"{before} comes before {names[i]}.")]
    chat = [Turn(say("next", u=unit, d=names[i]), f"{after} comes after {names[i]}.")]
    if not say.held_out and rng.random() < 0.25:
        chat.append(Turn(say("after_that"), f"{later} comes after {after}."))
    return chat


def calendar(rng: random.Random, say: Phraser) -> Chat:
    i = rng.randrange(12)
    roll = rng.random()
    if roll < 0.5:
        return [Turn(say("length", m=MONTHS[i]), month_length(MONTHS[i]))]
    if roll < 0.75 or say.held_out:
        return [Turn(say("month_number", o=facts.ORDINALS[i]), f"The {facts.ORDINALS[i]} month is {MONTHS[i]}.")]
    span = rng.choice(list(facts.SPANS))
    return [Turn(say("span", s=span), facts.SPANS[span])]


def month_length(month: str) -> str:
    return f"{month} has {facts.MONTH_LENGTHS[month]} days."


def recital(rng: random.Random, say: Phraser) -> Chat:
    """Longer answers, so that streaming has something to stream."""
    kind = rng.choice(("days", "months", "rainbow", "continents", "count", "about", "about"))
    if kind == "count":
        last = rng.randint(3, 30)
        return [Turn(say("count", n=last), ", ".join(map(str, range(1, last + 1))) + ".")]
    if kind == "about":
        country = _country(rng)
        return [Turn(say("about", c=_spoken(rng, country, say)), about(country))]
    names = {"days": DAYS, "months": MONTHS, "rainbow": facts.RAINBOW, "continents": facts.CONTINENTS}[kind]
    lead = {
        "days": "The days of the week are",
        "months": "The months of the year are",
        "rainbow": "The colors of the rainbow are",
        "continents": "The continents are",
    }[kind]
    return [Turn(say(kind), f"{lead} {', '.join(names[:-1])} and {names[-1]}.")]


def about(country: Country) -> str:
    subject = country.phrase[0].upper() + country.phrase[1:]
    text = f"{subject} is a country in {country.continent}. {capital_is(country)}"
    return f"{text} {also_called(country.capital)}" if country.capital in facts.NICKNAMES else text


def small_talk(rng: random.Random, say: Phraser) -> Chat:
    kinds = {
        "greet": "Hello! How can I help you?",
        "identity": IDENTITY,
        "thanks": "You are welcome!",
        "mood": "I am fine, thank you! How can I help you?",
        "ability": ABILITY,
        "bye": "Goodbye!",
    }
    kind = rng.choice(("greet", "identity", "thanks") if say.held_out else list(kinds))
    return [Turn(say(kind), kinds[kind])]


def unknown(rng: random.Random, say: Phraser) -> Chat:
    return [Turn(say("unknown", c=_country(rng).phrase), UNKNOWN)]


def json_object(rng: random.Random, say: Phraser) -> Chat:
    kinds = ("country", "country", "color", "sum")
    kind = rng.choice(kinds if say.held_out else (*kinds, "place", "info", "day", "month", "list"))
    slots, value = _json_parts(rng, kind)
    if not say.held_out and kind in ("country", "color") and rng.random() < 0.4:
        plain = say("capital" if kind == "country" else "color", **slots)
        return [Turn(f"{plain} {say('as_json')}", json.dumps(value, ensure_ascii=False))]
    return [Turn(say(f"json_{kind}", **slots), json.dumps(value, ensure_ascii=False))]


def _json_parts(rng: random.Random, kind: str) -> tuple[dict[str, object], object]:
    """The slots of the question, and the value asked for."""
    country, day, month = _country(rng), rng.choice(DAYS), rng.choice(MONTHS)
    pair = {"country": country.name, "capital": country.capital}
    match kind:
        case "country":
            return {"c": country.phrase}, pair
        case "place":
            return {"c": country.phrase}, pair | {"continent": country.continent}
        case "info":
            known = rng.choice([c for c in COUNTRIES if c.capital in facts.POPULATIONS])
            return {"c": known.phrase}, {"name": known.capital, "population": facts.POPULATIONS[known.capital]}
        case "color":
            thing = rng.choice(list(facts.COLORS))
            bare = thing.removeprefix("the ").removeprefix("an ").removeprefix("a ")
            return {"t": thing}, {"object": bare, "color": facts.COLORS[thing]}
        case "sum":
            a, b = rng.randint(0, 12), rng.randint(0, 12)
            return {"a": a, "b": b}, {"a": a, "b": b, "sum": a + b}
        case "day":
            return {"d": day}, {"day": day, "next": DAYS[(DAYS.index(day) + 1) % 7]}
        case "month":
            return {"m": month}, {"month": month, "days": facts.MONTH_LENGTHS[month]}
    count = rng.randint(2, 4)
    return {"n": count}, [{"country": c.name, "capital": c.capital} for c in _walk(rng, count)]


TOPICS: dict[Builder, int] = {
    capital: 16,
    capital_then_name: 9,
    capital_then_others: 10,
    capital_then_continent: 3,
    country_of: 7,
    verify: 9,
    continent: 5,
    nickname: 4,
    country_list: 9,
    color: 8,
    arithmetic: 18,
    neighbour: 7,
    calendar: 5,
    recital: 5,
    small_talk: 4,
    unknown: 2,
    json_object: 11,
}


def statement(rng: random.Random) -> str:
    """One plain sentence, for text completion without a chat."""
    country = _country(rng)
    kind = rng.choice(("add", "sub", "mul"))
    a, b = sorted((rng.randint(0, 12), rng.randint(0, 12)), reverse=True)
    i = rng.randrange(7)
    choices = (
        capital_is(country),
        capital_is(country),
        is_capital(country),
        about(country),
        sentence(equation(kind, a, b)),
        color_is(rng.choice(list(facts.COLORS))),
        f"{DAYS[(i + 1) % 7]} comes after {DAYS[i]}.",
        month_length(rng.choice(MONTHS)),
        also_called(rng.choice(list(facts.NICKNAMES))),
        f"Hello, my name is Demo. {IDENTITY}",
    )
    return rng.choice(choices)


def plain(rng: random.Random) -> str:
    """Statements, or a question with its answer, as running text."""
    if rng.random() < 0.3:
        say = Phraser(rng)
        turns = [rng.choice((capital, color, arithmetic, continent))(rng, say)[0] for _ in range(rng.randint(1, 3))]
        return "\n".join(f"Question: {turn.user}\nAnswer: {turn.answer}" for turn in turns)
    return " ".join(statement(rng) for _ in range(rng.choice((1, 1, 2, 3))))


def chats(seed: int) -> Iterator[tuple[str | None, Chat]]:
    """Endless training chats, each with a system prompt or none. A few are long: many subjects, one after the other."""
    rng = random.Random(seed)
    say = Phraser(rng)
    builders, weights = list(TOPICS), list(TOPICS.values())
    while True:
        subjects = rng.choices((1, 2, rng.randint(3, 30)), (90, 8, 2))[0]
        chat = [turn for build in rng.choices(builders, weights, k=subjects) for turn in build(rng, say)]
        yield (rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.4 else None), chat


EVALUATION: dict[Builder, int] = {
    capital: 40,
    country_list: 25,
    capital_then_name: 20,
    capital_then_others: 15,
    country_of: 15,
    verify: 15,
    arithmetic: 20,
    color: 15,
    continent: 10,
    neighbour: 8,
    calendar: 5,
    json_object: 10,
    small_talk: 2,
}


def held_out(seed: int, phrasings: dict[str, list[str]] = HELD_OUT) -> list[tuple[str, str | None, Chat]]:
    """200 different evaluation chats as (topic, system prompt, chat), every question phrased as never in training."""
    rng = random.Random(seed)
    say = Phraser(rng, phrasings)
    chosen: dict[str, tuple[str, str | None, Chat]] = {}
    for build, count in EVALUATION.items():
        target = len(chosen) + count
        while len(chosen) < target:
            chat = build(rng, say)
            system = "You are a helpful assistant." if rng.random() < 0.3 else None
            chosen.setdefault(" / ".join(turn.user for turn in chat), (build.__name__, system, chat))
    return list(chosen.values())


if __name__ == "__main__":
    import itertools

    for system, chat in itertools.islice(chats(seed=0), 40):
        print(f"[{system}]", *(f"U: {turn.user}\nA: {turn.answer}" for turn in chat), sep="\n", end="\n\n")
