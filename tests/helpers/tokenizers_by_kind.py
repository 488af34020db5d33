"""Small tokenizers of every kind that language models have, trained on a few sentences."""

from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. USER: what color is it? ASSISTANT: red. "
    "What is it? Red. How many, 3? 12 of them. Where and why? (left) far. Et? Été. a naïve café 日本 🙂 system user assistant "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. You are a helpful assistant."
)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]


def _byte_level(add_prefix_space=False):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return backend, trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def _byte_fallback(prepare):
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = (
        pre_tokenizers.Metaspace()
    )  # as SentencePiece trains: no entry holds the end of a word and a space
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [AddedToken(f"<0x{byte:02X}>", special=False) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    return backend, trainer, prepare


def _llama_2(backend):
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _metaspace(scheme):
    def prepare(backend):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)

    return prepare


def _one_white_space(backend):
    """A line break is a space, too, as in T5's."""
    backend.normalizer = normalizers.Replace(Regex(r"\s+"), " ")


def _unigram():
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    return backend, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )


def _wordpiece():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)


KINDS = {
    "byte-level": _byte_level,
    "byte-level, prefix space": lambda: _byte_level(add_prefix_space=True),
    "Llama 2": lambda: _byte_fallback(_llama_2),
    "Metaspace first": lambda: _byte_fallback(_metaspace("first")),
    "Metaspace always": lambda: _byte_fallback(_metaspace("always")),
    "Metaspace never": lambda: _byte_fallback(_metaspace("never")),
    "Unigram": _unigram,
    "one white space": lambda: _byte_fallback(_one_white_space),
    "WordPiece": _wordpiece,
}
POST_PROCESSORS = {"nothing": ("", ""), "BOS": ("<s> ", ""), "BOS and EOS": ("<s> ", " </s>"), "EOS": ("", " </s>")}


def make(kind, adds="nothing", strip=""):
    """A tokenizer. `adds`: what its post-processor adds. `strip`: "l", "r" or "lr", where <|im_end|> takes white space."""
    backend, trainer, *finish = KINDS[kind]()
    backend.train_from_iterator([TEXT] * 4 + ["Red. (left) Été. 12 of them"] * 20, trainer)
    for prepare in finish:
        prepare(backend)
    before, after = POST_PROCESSORS[adds]
    if before or after:
        special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=f"{before}$A{after}", special_tokens=special)
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<image>", "<|im_start|>", "<|im_end|>"],
    )
    if strip:
        end = AddedToken("<|im_end|>", lstrip="l" in strip, rstrip="r" in strip, normalized=False, special=True)
        found.add_special_tokens({"extra_special_tokens": [end]}, replace_extra_special_tokens=False)
    return found


def large(entries):
    """A byte-level BPE tokenizer with this many entries, nearly all from merges of made-up words: the size of Qwen's."""
    random = Random(0)
    known = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(known)}
    merges = []
    while len(vocabulary) < entries:
        pair = random.choice(known), random.choice(known)
        if len(word := "".join(pair)) <= 12 and word not in vocabulary:
            vocabulary[word] = len(vocabulary)
            merges.append(pair)
            known.append(word)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ends = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=["<image>"], **ends)
