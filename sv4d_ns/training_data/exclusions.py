"""Objects that published evaluations use, which no training data may hold."""

import re

OBJAVERSEDY_TEST_IDS = frozenset(
    {
        "edec2c2e1fd74742ad0288a93301f4a1",
        "d825a2b557e4465dbdfb43735733f904",
        "d662cbf69ace4d72a8e262a49aeafe7a",
        "d6289a90126441c6b13fcb5ed4c647ee",
        "d39a0dee0f054c21b6751f7821aa7a8e",
        "d2970c82f1e24a139599ad1c73a60523",
        "d043a031c07a49c099f4ab6c09825638",
        "c0fcad26bbb34889b39564807eca9bce",
        "b621ec8894734bc79c04338edff3cd0d",
        "ab30823b72b947bfa9e9bc6731fb95e3",
        "9cd6b8bdd29241aea779719994f4a41f",
        "8a5df6955aea41fdaa9484d7bac94a57",
        "8447d936455f44b982b3489e0df686cc",
        "4493534bb2f8403fa3b8a2ddb968bef8",
        "3d32db36ab6245f29fffb61483001f20",
        "34d16c3882f94a31bde584948883a06a",
        "30efc2fb700741bf846ea00e6e3f065f",
        "26ad402043b148ddb33e1bc52a909854",
        "0ef1295d23a94017b768b65561cea4fa",
        "02074af3625a46a3802e517f48b73e35",
    }
)
"""The 20 test objects of ObjaverseDy (Stability-AI/generative-models, issue 432)."""

CONSISTENT4D_PREFIXES = ("ba7b382c", "29c26c66", "53abad43", "22bbb0b7", "26adfd63", "a1c936d7", "9fea6ffd")
"""First digits of the ids of Consistent4D's seven test objects."""
_CONSISTENT4D = re.compile(rf"(?<![0-9a-z])({'|'.join(CONSISTENT4D_PREFIXES)})")


def is_test_object(name: str) -> bool:
    """Whether a name holds the id of a test object, or the first digits of one where a word of it begins."""
    lowered = name.lower()
    return any(uid in lowered for uid in OBJAVERSEDY_TEST_IDS) or _CONSISTENT4D.search(lowered) is not None
