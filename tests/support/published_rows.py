"""Rows in the exact shape of published data sets, with texts of our own, and the groups they become."""

from __future__ import annotations

from typing import Any

from madpo.trainer.formats.text_groups import Text, TextGroup


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def answer(text: str) -> list[dict[str, Any]]:
    return [says(text)]


TALK = "\n\nHuman: Is it warm?\n\nAssistant: Where?\n\nHuman: In the\n\nplot.\n\nAssistant:"
TURNS = [user("Is it warm?"), says("Where?"), user("In the\n\nplot.")]

HH_RLHF = {"chosen": f"{TALK} Quite warm.", "rejected": f"{TALK} No idea."}

ULTRAFEEDBACK_BINARIZED = {
    "prompt": "Name a prime.",
    "prompt_id": "5f1c",
    "chosen": [user("Name a prime."), says("Seven.")],
    "rejected": [user("Name a prime."), says("Nine.")],
    "messages": [user("Name a prime."), says("Seven.")],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}

ARGILLA_CLEANED = {
    "source": "evol_instruct",
    "prompt": "Name a prime.",
    "chosen": [user("Name a prime."), says("Seven.")],
    "chosen-rating": 4.75,
    "chosen-model": "a",
    "rejected": [user("Name a prime."), says("Nine.")],
    "rejected-rating": 4.5,
    "rejected-model": "b",
}


def _rated(response: str, overall: float, fine: float | None, *ratings: str) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    marks = ratings or ("3", "3", "3", "3")
    return {
        "annotations": {x: {"Rating": y, "Rationale": "so"} for x, y in zip(aspects, marks, strict=True)},
        "critique": "fine",
        "custom_system_prompt": "Be helpful.",
        "fine-grained_score": fine,
        "model": "m",
        "overall_score": overall,
        "principle": "helpfulness",
        "response": response,
    }


ULTRAFEEDBACK = {
    "source": "sharegpt",
    "instruction": "Name a prime.",
    "models": ["a", "b", "c", "d"],
    "completions": [
        _rated("Nine.", 10.0, 1.5),
        _rated("Seven.", 8.0, 4.5),
        _rated("Two or three.", 7.0, None, "4", "N/A", "4", "5.0"),
        _rated("Eleven.", 7.0, None, "N/A", "N/A", "N/A", "N/A"),
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}

NECTAR = {
    "prompt": f"{TALK} ",
    "answers": [
        {"answer": f"Answer {i}.", "model": "m", "rank": float(rank)}
        for i, rank in enumerate((2, 1, 3, 4, 6, 5, 6))
    ],
    "turns": 2,
    "num_response": 7,
    "source": ["lmsys-chat-1m"],
    "good_natured": True,
}

PKU = {
    "prompt": "May I open it?",
    "response_0": "Take a hammer.",
    "response_1": "Ask its owner.",
    "prompt_source": "p",
    "response_0_source": "a",
    "response_1_source": "b",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "response_0_harm_category": {"Violence": False},
    "response_1_harm_category": {"Violence": False},
    "response_0_severity_level": 2,
    "response_1_severity_level": 0,
    "better_response_id": 0,
    "safer_response_id": 1,
    "response_0_sha256": "00",
    "response_1_sha256": "11",
}

HELPSTEER = {
    "split": "train",
    "prompt": "A film?\n<extra_id_1>Assistant\nWhich kind?\n<extra_id_1>User\nA warm one.",
    "response_1": "The cold one.",
    "response_2": "The warm one.",
    "preference_strength": 2,
    "preference_statement": "2 is better",
    "preference_elaboration": "2 answers",
    "three_most_similar_preferences": [],
    "all_preferences_unprocessed": [],
}

TULU = {
    "id": "x-1",
    "prompt": "Which?",
    "chosen": [user("A book."), says("Good."), user("Which?"), says("The dull one.")],
    "rejected": [user("A book."), says("Good."), user("Which?"), says("None.")],
    "source": "allenai/x",
}

ORCA = {"system": "You are brief.", "question": "Why?", "chosen": "So it is.", "rejected": "Who knows."}

DISTILABEL = {
    "system": "",
    "input": "Why?",
    "chosen": "So it is.",
    "rejected": "Who knows.",
    "generations": ["Who knows.", "So it is."],
    "order": ["rejected", "chosen"],
    "labelling_model": "j",
    "labelling_prompt": [system("Judge."), user("Which?")],
    "raw_labelling_response": "5\n9",
    "rating": [5.0, 9.0],
    "rationale": "r",
    "status": "unchanged",
    "original_chosen": "So it is.",
    "original_rejected": "Who knows.",
    "chosen_score": 9.0,
    "in_gsm8k_train": False,
}

RED_TEAM = {
    "transcript": f"{TALK} Quite warm.\n\nHuman: Thanks.\n\nAssistant: ",
    "min_harmlessness_score_transcript": 1.2,
    "num_params": "52B",
    "model_type": "context-distilled",
    "rating": 0.0,
    "task_description": "t",
    "tags": None,
}

KTO = {"prompt": [user("Why?")], "completion": answer("So."), "label": False}

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]

SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "What is on?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"day": "today"}}'},
        {"from": "observation", "value": "a film"},
        {"from": "gpt", "value": "A film."},
    ],
    "system": "Look first.",
    "tools": '[{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]',
}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"day": "today"}}}

SHAREGPT_PAIR = {
    "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Good?"}],
    "chosen": {"from": "gpt", "value": "Very."},
    "rejected": {"from": "gpt", "value": "No."},
}

ALPACA = {"instruction": "Add them.", "input": "1, 2", "output": "3", "text": "not used"}
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd them.\n\n"
    "### Input:\n1, 2\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nAdd them.\n\n### Response:"
)

ORCA_SFT = {"id": "niv.1", "system_prompt": "Think.", "question": "Why?", "response": "So."}
DOLLY = {"instruction": "Who?", "context": "Ann came.", "response": "Ann.", "category": "closed_qa"}
META_MATH = {"type": "GSM_Rephrased", "query": "1 + 1?", "original_question": "x", "response": "2"}

PRIME = [user("Name a prime.")]
BOTH: list[Text] = [answer("Quite warm."), answer("No idea.")]
RANKS = (2, 1, 3, 4, 6, 5, 6)

INSTRUCTION_PAIR = {
    "instruction": "Add one.",
    "input": "Three",
    "system": "Be terse.",
    "history": [["One?", "Two."]],
    "chosen": "Four.",
    "rejected": "I think it is four.",
}

GOOD: list[tuple[str, dict[str, Any], TextGroup]] = [
    ("hh_rlhf", HH_RLHF, TextGroup(TURNS, BOTH, [(0, 1, None)])),
    ("hh_rlhf_text", HH_RLHF, TextGroup(TALK, [" Quite warm.", " No idea."], [(0, 1, None)])),
    (
        "ultrafeedback_binarized",
        ULTRAFEEDBACK_BINARIZED,
        TextGroup(PRIME, [answer("Seven."), answer("Nine.")], [(0, 1, 5.5)]),
    ),
    (
        "ultrafeedback_binarized",
        ARGILLA_CLEANED,
        TextGroup(PRIME, [answer("Seven."), answer("Nine.")], [(0, 1, 0.25)]),
    ),
    (
        "ultrafeedback",
        ULTRAFEEDBACK,
        TextGroup(
            PRIME,
            [answer("Nine."), answer("Seven."), answer("Two or three.")],
            [(1, 0, 3.0), (1, 2, 4.5 - 13 / 3), (2, 0, 13 / 3 - 1.5)],
        ),
    ),
    (
        "nectar",
        NECTAR,
        TextGroup(
            TURNS,
            [answer(f"Answer {i}.") for i in range(7)],
            [(i, j, None) for i in range(7) for j in range(7) if RANKS[i] < RANKS[j]],
        ),
    ),
    (
        "pku_safe_rlhf",
        PKU,
        TextGroup(
            [user("May I open it?")], [answer("Take a hammer."), answer("Ask its owner.")], [(0, 1, None)]
        ),
    ),
    (
        "pku_safe_rlhf_safety",
        PKU,
        TextGroup(
            [user("May I open it?")], [answer("Ask its owner."), answer("Take a hammer.")], [(0, 1, None)]
        ),
    ),
    (
        "helpsteer2_preference",
        HELPSTEER,
        TextGroup(
            [user("A film?"), says("Which kind?"), user("A warm one.")],
            [answer("The cold one."), answer("The warm one.")],
            [(1, 0, 2.0)],
        ),
    ),
    (
        "tulu_preferences",
        TULU,
        TextGroup(TULU["chosen"][:3], [answer("The dull one."), answer("None.")], [(0, 1, None)]),
    ),
    (
        "orca_pairs",
        ORCA,
        TextGroup(
            [system("You are brief."), user("Why?")],
            [answer("So it is."), answer("Who knows.")],
            [(0, 1, None)],
        ),
    ),
    (
        "orca_pairs",
        DISTILABEL,
        TextGroup([user("Why?")], [answer("So it is."), answer("Who knows.")], [(0, 1, 4.0)]),
    ),
    (
        "orca_pairs",
        {**DISTILABEL, "rating": [7.0, 7.0], "status": "tie"},
        TextGroup([user("Why?")], [answer("So it is."), answer("Who knows.")], []),
    ),
    ("plain_text", RED_TEAM, TextGroup(TURNS, [answer("Quite warm.")], [])),
    ("kto", KTO, TextGroup([user("Why?")], [answer("So.")], [], [-1])),
    (
        "sharegpt",
        SHAREGPT,
        TextGroup(
            [
                system("Look first."),
                user("What is on?"),
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": "a film"},
            ],
            [answer("A film.")],
            [],
            tools=TOOLS,
        ),
    ),
    (
        "sharegpt",
        SHAREGPT_PAIR,
        TextGroup([system("Be kind."), user("Good?")], [answer("Very."), answer("No.")], [(0, 1, None)]),
    ),
    ("alpaca", ALPACA, TextGroup(WITH_INPUT, ["3"], [])),
    ("alpaca", {**ALPACA, "input": ""}, TextGroup(WITHOUT_INPUT, ["3"], [])),
    ("instruction_output", ORCA_SFT, TextGroup([system("Think."), user("Why?")], [answer("So.")], [])),
    ("instruction_output", DOLLY, TextGroup([user("Who?\nAnn came.")], [answer("Ann.")], [])),
    ("instruction_output", META_MATH, TextGroup([user("1 + 1?")], [answer("2")], [])),
    (
        "instruction_output",
        {"instruction": "And his?", "input": "", "output": "Ben.", "history": [["Her name?", "Ann."]]},
        TextGroup([user("Her name?"), answer("Ann.")[0], user("And his?")], [answer("Ben.")], []),
    ),
    (
        "instruction_pairs",
        INSTRUCTION_PAIR,
        TextGroup(
            [system("Be terse."), user("One?"), answer("Two.")[0], user("Add one.\nThree")],
            [answer("Four."), answer("I think it is four.")],
            [(0, 1, None)],
        ),
    ),
]
"""(adapter, row, the group it becomes)."""

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("hh_rlhf", {"chosen": "Quite warm."}, "chosen: expected a transcript that begins with"),
    (
        "hh_rlhf",
        {"rejected": f"{TALK} "},
        "rejected: the transcript does not end with words",
    ),
    ("hh_rlhf", {"rejected": f"{TALK} No.\n\nHuman: And?"}, "rejected: the transcript does not end with"),
    (
        "hh_rlhf_text",
        {"rejected": "\n\nHuman: x\n\nAssistant: y"},
        "chosen and rejected: the transcr",
    ),
    ("hh_rlhf_text", {"rejected": TALK}, "rejected: the transcript does not end with"),
    ("hh_rlhf_text", {"chosen": None}, "chosen: is null"),
    ("ultrafeedback_binarized", {"score_rejected": "low"}, "score_rejected: expected a finite number"),
    (
        "ultrafeedback_binarized",
        {"score_chosen": None, "chosen-rating": "5", "rejected-rating": 1.0},
        "chosen-rating: expected a finite number",
    ),
    (
        "ultrafeedback",
        {"completions": [ULTRAFEEDBACK["completions"][0], 7]},
        r"completions\[1\]: expected",
    ),
    (
        "ultrafeedback",
        {"completions": [_rated("", 1.0, 2.0)] * 2},
        r"completions\[0\]: response: expected",
    ),
    ("ultrafeedback", {"completions": None}, "completions: expected a list of at least 2, got None"),
    (
        "nectar",
        {"answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
        r"answers\[1\]: rank: expected",
    ),
    ("nectar", {"prompt": "Is it warm?"}, "prompt: expected a transcript"),
    ("pku_safe_rlhf", {"better_response_id": 2}, "better_response_id: 0 or 1, got 2"),
    ("pku_safe_rlhf", {"response_1": ""}, "response_1: expected text, got ''"),
    ("pku_safe_rlhf_safety", {"safer_response_id": -1}, "safer_response_id: 0 or 1, got -1"),
    ("helpsteer2_preference", {"preference_strength": None}, "preference_strength: expected a finite number"),
    ("tulu_preferences", {"chosen": "text"}, "chosen: expected a list of messages, got 'text'"),
    ("orca_pairs", {"system": 3}, "system: expected text, got 3"),
    ("orca_pairs", {"rating": [1.0]}, r"rating: expected two numbers, got \[1.0\]"),
    ("plain_text", {"transcript": "\n\nHuman: Hello."}, "transcript: no words of the assistant"),
    ("kto", {"label": "yes"}, "label: true"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, r"conversations\[0\]: expected an object with from"),
    (
        "sharegpt",
        {"conversations": [{"from": "me", "value": "x"}]},
        r"conversations\[0\]: from is one of",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "look()"}]},
        r"conversations\[0\]: expected tool calls, got no JSON",
    ),
    ("sharegpt", {"conversations": SHAREGPT["conversations"][:3]}, "a completion has the roles tool"),
    (
        "sharegpt",
        {"chosen": {"from": "gpt", "value": "a"}},
        "rejected: expected an object",
    ),
    ("sharegpt", {"tools": "look"}, "tools: expected JSON, got 'look'"),
    ("alpaca", {"input": 5}, "input: expected text, got 5"),
    ("instruction_output", {"response": None}, "output: is (null|missing)"),
    ("instruction_pairs", {"history": [["One?"]]}, "history: expected pairs of a question and its answer"),
]
"""(adapter, what is changed in its first good row, the message)."""
