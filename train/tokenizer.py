"""The embedded model's tokenizer."""

from dms.evaluation.corpus import stdlib_files
from dms.evaluation.lexicon import FIRST_WORDS, SECOND_WORDS, VALUES
from dms.evaluation.tasks import DISTRACTOR, EVENT, QUESTION, RECORD

BOS, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(vocab_size: int, context: int):
    """A byte-level BPE of the training files, with one token for each word of a planted name, each value and each marker."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    planted = [f" ${word}" for word in FIRST_WORDS] + [f"-{word}" for word in SECOND_WORDS] + [f" {value}" for value in VALUES]
    planted += [RECORD, QUESTION, EVENT, DISTRACTOR]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(planted),
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files(held_out=False)), trainer)
    # Documents are made of lines that are tokenised each by itself: a text read as a whole must come out the same, its line ends apart
    # from the next line's indentation. The vocabulary was learnt without that.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "merged_with_previous"), tokenizer.pre_tokenizer])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in planted])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
