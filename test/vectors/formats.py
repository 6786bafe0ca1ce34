#!/usr/bin/env python3
"""The formats of doc/formats.md, implemented a second time.

Written from the page, not from the C code, with nothing but the standard
library: where the two agree on the test vectors, the page says enough.

    formats.py               print the test vectors as JSON
    formats.py --check FILE  exit with 1 if FILE (such JSON, or the page) differs
    formats.py --tables      print the vectors as the page's tables
"""

import argparse
import hashlib
import hmac
import json
import sys
import uuid
from decimal import Decimal

FINGERPRINT_VERSION = 1
NAMESPACE_ID_LEN = 8
STRIPE_COMPARE_IGNORE = ["metadata", "description", "expand"]


# The formats

def uint64(number):
    return number.to_bytes(8, "big")


def prefixed(data):
    return uint64(len(data)) + data


def mac(namespace, label, *fields):
    message = b"".join(prefixed(part) for part in (label.encode("ascii"), *fields))
    return hmac.new(namespace, message, hashlib.sha256).digest()


def derived_uuid(namespace, label, *fields):
    octets = bytearray(mac(namespace, label, *fields)[:16])
    octets[6] = octets[6] & 0x0F | 0x80
    octets[8] = octets[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(octets)))


def operation_uuid(namespace, scope, key):
    return derived_uuid(namespace, "operation-uuid/1",
                        scope.encode("utf-8"), key.encode("utf-8"))


def stripe_key(namespace, account, operation_type, operation_id, generation):
    derived = derived_uuid(namespace, "stripe-key/1",
                           account.encode("utf-8"),
                           operation_type.encode("ascii"),
                           operation_id.encode("ascii"),
                           str(generation).encode("ascii"))
    return f"{operation_type}:{operation_id}:{derived}"


def namespace_id(namespace):
    return mac(namespace, "namespace-id/1")[:NAMESPACE_ID_LEN]


def number_text(number):
    """DIGITSeEXPONENT, the digits without a zero at either end."""
    sign, digits, exponent = number.as_tuple()
    digits = "".join(map(str, digits)).lstrip("0")
    if not digits:
        return "0e0"
    significant = digits.rstrip("0")
    exponent += len(digits) - len(significant)
    return f"{'-' if sign else ''}{significant}e{exponent}"


def canonical(value, ignore=(), top=True):
    """Encode a parsed JSON value; ignore: names left out of this object."""
    if value is None:
        return b"n"
    if value is True:
        return b"t"
    if value is False:
        return b"f"
    if isinstance(value, Decimal):
        return b"d" + prefixed(number_text(value).encode("ascii"))
    if isinstance(value, str):
        return b"s" + prefixed(value.encode("utf-8"))
    if isinstance(value, list):
        return b"a" + uint64(len(value)) + b"".join(
            canonical(element, (), False) for element in value)
    members = sorted(((name.encode("utf-8"), name) for name in value if name not in ignore),
                     key=lambda member: (len(member[0]), member[0]))
    return b"o" + uint64(len(members)) + b"".join(
        prefixed(encoded) + canonical(value[name],
                                      ignore if top and name == "params" else (), False)
        for encoded, name in members)


def no_constant(name):
    raise ValueError(f"{name} is no JSON")


def parse(text):
    return json.loads(text, parse_float=Decimal, parse_int=Decimal,
                      parse_constant=no_constant)


def fingerprint(namespace, request, ignore=()):
    return (bytes([FINGERPRINT_VERSION]) + namespace_id(namespace)
            + mac(namespace, "fingerprint/1", canonical(parse(request), ignore)))


# The test vectors

NAMESPACE = bytes(range(32))

MACS = [
    # label, fields
    ("test/1", []),
    ("test/1", [b""]),
    ("test/1", [b"ab", b"c"]),
    ("test/1", [b"a", b"bc"]),
]

STRIPE_KEYS = [
    # account, operation type, operation id, generation
    ("", "payment", "order_1001", 1),
    ("", "payment", "order_1001", 2),
    ("", "payment", "order_1001", 10),
    ("acct_1Abc", "payment", "order_1001", 1),
    ("acct_1Abc", "payment", "order_1001", 2),
    ("", "refund:partial", "order_1001", 1),
    ("", "refund", "partial:order_1001", 1),
    ("", "payment", "an id ~ with spaces", 1),
    ("Zürich", "payment", "order_1001", 1),
    ("", "t", "i" * 216, 1),
]

OPERATION_UUIDS = [
    # scope, key
    ("", "8e03978e-40d5-43e8-bc93-6894a57f9324"),
    ("tenant 42", "8e03978e-40d5-43e8-bc93-6894a57f9324"),
    ("tenant 4", "28e03978e-40d5-43e8-bc93-6894a57f9324"),
    ("Müller & Söhne", "order-1"),
    ("株式会社", "注文-1"),
    ("\N{GRINNING FACE}", "\N{GREEK SMALL LETTER OMEGA}"),
]

# more digits than any binary floating-point number keeps
PI = "314159265358979323846264338327950288419716939937510582097494459"

FINGERPRINTS = [
    # name, request, ignored names
    ("null", "null", []),
    ("true", "true", []),
    ("false", "false", []),
    ("one", "1", []),
    ("one with a fraction", "1.0", []),
    ("one with an exponent", "1e0", []),
    ("one from tenths", "0.1e1", []),
    ("minus one", "-1", []),
    ("zero", "0", []),
    ("negative zero", "-0", []),
    ("zero with a fraction", "0.00", []),
    ("zero with an exponent", "-0.0e5", []),
    ("one hundred", "100", []),
    ("one hundred with an exponent", "1E+2", []),
    ("one hundred from tens", "10e1", []),
    ("zeros on either side of the point", "-1200.3400", []),
    ("zeros on either side, with an exponent", "-12003400e-4", []),
    ("zeros between digits", "1002003000", []),
    ("a negative number with a fraction", "-120.5", []),
    ("a thousandth", "0.001", []),
    ("a thousandth with an exponent", "1e-3", []),
    ("a half", "0.50", []),
    ("a half with an exponent", "5e-1", []),
    ("more digits than a double has", "12345678901234567890.12345678901234567890", []),
    ("one more in its last digit", "12345678901234567890.12345678901234567891", []),
    ("a small number", "-1.5e-10", []),
    ("a large number", "1e40", []),
    ("a large number written out", "1" + "0" * 40, []),
    ("a large number with digits", PI, []),
    ("a large number with digits and zeros", PI + "0" * 20, []),
    ("a large number with digits and an exponent", "-" + PI + "e1000", []),
    ("the largest power of ten in jsonb", "1e131071", []),
    ("the largest power of ten from a tenth", "0.1e131072", []),
    ("the largest power of ten from ten", "10e131070", []),
    ("the smallest power of ten in jsonb", "1e-16383", []),
    ("the smallest power of ten from a tenth", "0.1e-16382", []),
    ("the same, negative", "-1e-16383", []),
    ("zero with a large exponent", "0e131071", []),
    ("empty string", '""', []),
    ("string of a digit", '"1"', []),
    ("ASCII string", '"hello"', []),
    ("escaped string", '"\\u0068ello"', []),
    ("string with quotes and controls", '"\\"\\\\\\n\\t\\u0001"', []),
    ("Latin string", '"naïve café"', []),
    ("the same, decomposed", '"nai\\u0308ve cafe\\u0301"', []),
    ("Japanese string", '"注文"', []),
    ("string beyond the first plane", '"\N{GRINNING FACE}"', []),
    ("empty object", "{}", []),
    ("empty array", "[]", []),
    ("array of null", "[null]", []),
    ("array of an empty array", "[[]]", []),
    ("array of one number", "[1]", []),
    ("array of three", "[1, 2, 3]", []),
    ("array of three in another order", "[3, 2, 1]", []),
    ("array, divided", '[["a"], ["b", "c"]]', []),
    ("array, divided elsewhere", '[["a", "b"], ["c"]]', []),
    ("object", '{"amount": 1000, "currency": "eur"}', []),
    ("object in another order", '{ "currency":"eur","amount":1000.00 }', []),
    ("object, name twice", '{"amount": 1, "currency": "eur", "amount": 1000}', []),
    ("object, name and value swapped", '{"eur": "currency", "amount": 1000}', []),
    ("object with a null", '{"amount": 1000, "currency": "eur", "note": null}', []),
    ("object with an empty name", '{"": 1}', []),
    ("names by length, then bytes", '{"b": 1, "aa": 2, "a": 3, "B": 4, "": 5}', []),
    ("names by their length in UTF-8", '{"é": 1, "zz": 2, "aaa": 3, "ü": 4, "z": 5}', []),
    ("nested", '{"a": [{"b": {"c": [1, "x", null, true]}}, []], "d": {}}', []),
    ("HTTP request",
     '{"method": "POST", "path": "/v1/orders", "body": {"items": [{"sku": "a", "n": 2}], "total": 19.90}}',
     []),
    ("Stripe request",
     '{"method": "POST", "path": "/v1/payment_intents", "params": {"amount": 1000, "currency": "eur"}}',
     STRIPE_COMPARE_IGNORE),
    ("Stripe request with ignored members",
     '{"method": "POST", "path": "/v1/payment_intents", "description": 1, "params":'
     ' {"amount": 1000, "currency": "eur", "metadata": {"a": "b"}, "expand": ["customer"]}}',
     STRIPE_COMPARE_IGNORE),
    ("Stripe request, nothing ignored",
     '{"method": "POST", "path": "/v1/payment_intents", "description": 1, "params":'
     ' {"amount": 1000, "currency": "eur", "metadata": {"a": "b"}, "expand": ["customer"]}}',
     []),
    ("ignored names further inside count",
     '{"params": {"payment_intent_data": {"metadata": {"a": "b"}}}, "body": {"metadata": 1}}',
     STRIPE_COMPARE_IGNORE),
    ("params that is no object", '{"params": [{"metadata": 1}]}', STRIPE_COMPARE_IGNORE),
    ("params inside params", '{"params": {"params": {"metadata": 1}}}', STRIPE_COMPARE_IGNORE),
    ("array at the top", '[{"metadata": 1}]', STRIPE_COMPARE_IGNORE),
    ("everything ignored", '{"metadata": {"a": "b"}}', STRIPE_COMPARE_IGNORE),
    ("params itself ignored", '{"params": {"a": 1}}', ["params"]),
]


def vectors():
    return {
        "namespace": NAMESPACE.hex(),
        "namespace_id": namespace_id(NAMESPACE).hex(),
        "mac": [
            {"label": label, "fields": [field.hex() for field in fields],
             "mac": mac(NAMESPACE, label, *fields).hex()}
            for label, fields in MACS],
        "operation_uuid": [
            {"scope": scope, "key": key, "uuid": operation_uuid(NAMESPACE, scope, key)}
            for scope, key in OPERATION_UUIDS],
        "stripe_key": [
            {"account": account, "operation_type": operation_type,
             "operation_id": operation_id, "generation": generation,
             "key": stripe_key(NAMESPACE, account, operation_type, operation_id, generation)}
            for account, operation_type, operation_id, generation in STRIPE_KEYS],
        "fingerprint": [
            {"name": name, "request": request, "ignore": ignore,
             "encoding": canonical(parse(request), ignore).hex(),
             "fingerprint": fingerprint(NAMESPACE, request, ignore).hex()}
            for name, request, ignore in FINGERPRINTS],
    }


def code(text):
    return f"`{text}`" if text else "(empty)"


def tables(all_vectors):
    lines = []

    def table(title, head, rows):
        lines.extend(["", title, "", "| " + " | ".join(head) + " |",
                      "|" + "---|" * len(head)])
        lines.extend("| " + " | ".join(row) + " |" for row in rows)

    table("MAC", ["label", "fields (hex)", "MAC"],
          [[code(v["label"]),
            ", ".join(code(field) for field in v["fields"]) or "none",
            code(v["mac"])] for v in all_vectors["mac"]])
    table("Operation UUID", ["scope", "key", "UUID"],
          [[code(v["scope"]), code(v["key"]), code(v["uuid"])]
           for v in all_vectors["operation_uuid"]])
    table("Stripe key", ["account", "type", "id", "generation", "key"],
          [[code(v["account"]), code(v["operation_type"]), code(v["operation_id"]),
            str(v["generation"]), code(v["key"])]
           for v in all_vectors["stripe_key"] if len(v["operation_id"]) < 100])
    equal = {}
    for v in all_vectors["fingerprint"]:
        equal.setdefault((v["fingerprint"], tuple(v["ignore"])), []).append(v["request"])
    table("Fingerprint", ["equal requests", "ignored", "MAC (the last 32 bytes)"],
          [["<br>".join(code(request) for request in requests),
            ", ".join(code(name) for name in ignore),
            code(value[2 * (1 + NAMESPACE_ID_LEN):])]
           for (value, ignore), requests in equal.items()])
    return "\n".join(lines[1:])


def differences(path, computed):
    """What the file of vectors, or the page with their tables, has wrong."""
    with open(path, encoding="utf-8") as file:
        content = file.read()
    if path.endswith(".md"):
        page = set(content.splitlines())
        return [f"missing: {line}" for line in tables(computed).splitlines()
                if line.startswith("|") and line not in page]
    stored = json.loads(content)
    return ([f"{part}: should be {new}" for part, new in computed.items()
             if stored.get(part) != new]
            + [f"{part}: unknown" for part in stored if part not in computed])


def main():
    parser = argparse.ArgumentParser(description="Test vectors of doc/formats.md.")
    parser.add_argument("--check", metavar="FILE", help="compare with such a file, or with the page")
    parser.add_argument("--tables", action="store_true", help="print the page's tables")
    arguments = parser.parse_args()

    sys.stdout.reconfigure(encoding="utf-8")
    computed = vectors()
    if arguments.check:
        wrong = differences(arguments.check, computed)
        for message in wrong:
            print(message, file=sys.stderr)
        return 1 if wrong else 0
    if arguments.tables:
        print(tables(computed))
    else:
        print(json.dumps(computed, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
