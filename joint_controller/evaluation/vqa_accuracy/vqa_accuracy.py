"""The accuracy of VQA v2: an answer counts as far as the human annotators agree with it."""

import re
from collections.abc import Sequence

from joint_controller.evaluation.answer_metric import AnswerMetric, check_references


# The tables below are the data of the official evaluation (https://visualqa.org/evaluation.html), oddities included,
# since published accuracies depend on them: words are lower-cased before they are looked up, so that the capitalised
# contractions never match.
_CONTRACTIONS = dict(
    pair.split("=")
    for pair in """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
    couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
    hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd
    howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd itd've=it'd've
    it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've
    mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't
    ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've she's=she's
    shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
    somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's
    someoned=someone'd someoned've=someone'd've someone'dve=someone'd've someonell=someone'll someones=someone's
    somethingd=something'd somethingd've=something'd've something'dve=something'd've somethingll=something'll
    thats=that's thered=there'd thered've=there'd've there'dve=there'd've therere=there're theres=there's
    theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas
    wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're whats=what's
    whatve=what've whens=when's whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've
    who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't
    wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll
    y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
    you'dve=you'd've youll=you'll youre=you're youve=you've
    """.split()
)
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_NUMBERS["none"] = "0"
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official pattern, whose first group reads "not after the characters <=digit" where "not after a digit" was meant:
# what it does is to remove every period that no digit follows.
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
# The official code passes a flag of this value where the substitution takes the largest number of replacements.
_MOST_PERIODS = int(re.UNICODE)


def normalize_answer(answer: str) -> str:
    """
    The normal form in which VQA v2 compares answers: lower case without punctuation and articles, with digits for the
    number words up to ten and an apostrophe in contractions. May be empty, e.g. for `"the"`.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    number_with_comma = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        # A mark at the edge of a word somewhere is removed everywhere, one that is only inside words divides them.
        at_edge = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if at_edge or number_with_comma else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_score(prediction: str, references: Sequence[str]) -> float:
    """
    As [`AnswerMetric.score`]: with several references the mean over all subsets that leave one out of min(number of
    equal references / 3, 1); with one reference 1.0 where it is equal and 0.0 otherwise.
    """
    check_references(f"the answer {prediction!r}", references)
    prediction = normalize_answer(prediction)
    equal = [normalize_answer(reference) == prediction for reference in references]
    if len(equal) == 1:
        return float(equal[0])
    matches = sum(equal)
    return sum(min((matches - left_out) / 3, 1.0) for left_out in equal) / len(equal)


class VqaAccuracy(AnswerMetric):
    """
    Accuracy of VQA v2. Prediction and references are brought to a normal form (lower case, no articles, digits for number
    words, apostrophes in contractions, no punctuation). With several references the score of a prediction is
    min(number of equal references / 3, 1), averaged over all subsets that leave one reference out; with one reference it is
    1 where both are equal and 0 otherwise.

    Example:

    ```python
    >>> metric = evaluate.load("joint_controller/evaluation/vqa_accuracy")
    >>> metric.compute(predictions=["two"], references=[["2", "2", "two", "3"]])
    {'vqa_accuracy': 0.75}
    ```
    """

    metric_name = "vqa_accuracy"
    references = "For each answer the annotators' answers, one or more (ten in VQA v2)."
    bibtex = """
    @inproceedings{goyal2017making,
        title = {Making the {V} in {VQA} Matter: Elevating the Role of Image Understanding in Visual Question Answering},
        author = {Goyal, Yash and Khot, Tejas and Summers-Stay, Douglas and Batra, Dhruv and Parikh, Devi},
        booktitle = {CVPR},
        year = {2017},
    }
    """
    urls = ["https://visualqa.org/evaluation.html"]
    score = staticmethod(vqa_score)
