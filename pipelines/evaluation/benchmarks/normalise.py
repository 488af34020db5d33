"""The answer normaliser of VQA, shared by VQAv2, TextVQA and VizWiz.

Rules from the VQA evaluation (Antol et al. 2015, "VQA"; official script vqaEval.py, `processPunctuation` and
`processDigitArticle`) and from its TextVQA variant (`EvalAIAnswerProcessor` of MMF's M4C evaluator, which LLaVA uses).
"""

import re
from functools import lru_cache

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}

# The correct spellings in the official table. Only lower-case ones: text is lower-cased before it is looked up.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905


def _misspellings(word: str) -> list[str]:
    """Return the spellings with one apostrophe left out."""
    return [word[:place] + word[place + 1 :] for place, mark in enumerate(word) if mark == "'"]


# Misspelt → correct. The official table has the entry for "somebody'd" reversed, which is kept.
CONTRACTIONS = {wrong: word for word in _CONTRACTIONS for wrong in _misspellings(word)} | {"somebody'd": "somebodyd"}

_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
# The official pattern is meant to also require no digit before the stop, but a syntax error in it disables that check.
_FULL_STOP = re.compile(r"\.(?!\d)")


def strip_punctuation(text: str) -> str:
    """Remove punctuation: replaced by nothing if it is next to a space (or a number has a comma), else by a space."""
    tight = _DIGITS_WITH_COMMA.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if tight or f"{mark} " in text or f" {mark}" in text else " ")
    return _FULL_STOP.sub("", out)


def plain_words(text: str) -> str:
    """Lower the case, write numbers up to ten as digits, drop articles, and put apostrophes into contractions."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)  # there are few distinct human answers
def vqa_normal(text: str) -> str:
    """Return an answer as vqaEval.py compares it."""
    return plain_words(strip_punctuation(one_line(text)))


def textvqa_normal(text: str) -> str:
    """Return an answer as the M4C evaluator compares it: commas and question marks go first, "'s" becomes a word."""
    return vqa_normal(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def one_line(text: str) -> str:
    """Return text with line breaks and tabs as spaces, and no space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()
