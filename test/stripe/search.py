"""The query language of Stripe's search, and its lag.

    status:'succeeded' AND metadata['order']:'42' AND amount>1000 AND -currency:'usd'

Clauses are joined by AND or by OR, never both, ten at the most.  Strings match
without regard to case.  What was written less than "search_lag" seconds ago
isn't found, or is found by what it was before; the answer has it as it is now.
"""

import re

import errors

# type -> fields that can be searched besides metadata
FIELDS = {
    "charge": {"amount", "created", "currency", "customer", "status", "refunded", "payment_intent"},
    "customer": {"created", "email", "name", "phone"},
    "invoice": {"created", "currency", "customer", "number", "status", "subscription", "total"},
    "payment_intent": {"amount", "created", "currency", "customer", "status"},
    "price": {"active", "currency", "lookup_key", "product", "type"},
    "product": {"active", "description", "name", "url"},
    "subscription": {"created", "status", "canceled_at"},
}
NUMBERS = {"amount", "created", "total", "canceled_at"}
OLDEST_VERSION = "2020-08-27"
MAX_CLAUSES = 10

CLAUSE = re.compile(r"""\s*(?P<not>-)?\s*(?P<field>[a-z_.]+)
    (?:\[\s*(?P<q>['"])(?P<name>(?:\\.|(?!(?P=q)).)*)(?P=q)\s*\])?
    \s*(?P<operator>>=|<=|[:~<>=])\s*
    (?:(?P<vq>['"])(?P<text>(?:\\.|(?!(?P=vq)).)*)(?P=vq)|(?P<bare>[A-Za-z0-9_.-]+))""", re.X)
JOIN = re.compile(r"\s+(AND|OR)\s+|\s+(?=\S)", re.I)


def unescape(text):
    return re.sub(r"\\(.)", r"\1", text)


def parse(query, name):
    def malformed(why):
        return errors.invalid(f"We were unable to parse your search query: {why}. Please see "
                              "https://stripe.com/docs/search#search-query-language", param="query")

    clauses, joins, at = [], set(), 0
    query = query.strip()
    while True:
        match = CLAUSE.match(query, at)
        if not match:
            raise malformed(f"no clause at '{query[at:at + 20]}'")
        field = match["field"]
        if (field == "metadata") != (match["name"] is not None):
            raise malformed(f"'{field}'")
        if field != "metadata" and field not in FIELDS[name]:
            raise errors.invalid(f"Field `{field}` is an unsupported search field for resource "
                                 f"`{name}s`.", param="query")
        value = unescape(match["text"]) if match["text"] is not None else match["bare"]
        quoted = match["text"] is not None
        if field == "metadata" and not quoted and value != "null":
            raise malformed("values must be quoted")
        if match["operator"] in ("<", ">", "<=", ">=") and field not in NUMBERS:
            raise malformed(f"{match['operator']} works on numbers")
        if field in NUMBERS and not (value.isascii() and value.isdigit()) and value != "null":
            raise malformed(f"'{value}' is no number")
        clauses.append((bool(match["not"]), field, match["name"] and unescape(match["name"]),
                        match["operator"], None if value == "null" and not quoted else value))
        at = match.end()
        if at == len(query):
            break
        join = JOIN.match(query, at)
        if not join:
            raise malformed(f"'{query[at:at + 20]}'")
        joins.add((join[1] or "AND").upper())
        at = join.end()
    if len(joins) > 1:
        raise malformed("AND and OR can't be combined")
    if len(clauses) > MAX_CLAUSES:
        raise malformed(f"at most {MAX_CLAUSES} clauses")
    return clauses, "OR" in joins


def holds(clause, obj):
    negated, field, name, operator, value = clause
    actual = (obj.get("metadata") or {}).get(name) if field == "metadata" else obj.get(field)
    if value is None:
        result = actual is None
    elif actual is None:
        result = False
    elif operator in ("<", ">", "<=", ">="):
        left, right = int(actual), int(value)
        result = {"<": left < right, ">": left > right,
                  "<=": left <= right, ">=": left >= right}[operator]
    else:
        if isinstance(actual, bool):
            actual = "true" if actual else "false"
        actual, value = str(actual).lower(), value.lower()
        result = value in actual if operator == "~" else actual == value
    return result != negated


def search(call, name, given, url):
    if call.version < OLDEST_VERSION:
        raise errors.invalid(f"Search needs API version {OLDEST_VERSION} or later.")
    clauses, any_of = parse(given["query"], name)
    limit = given.get("limit", 10)
    if not 1 <= limit <= 100:
        raise errors.invalid("This value must be between 1 and 100.", param="limit",
                             code="parameter_invalid_integer")
    lag = call.world.settings["search_lag"]
    known_until = call.world.clock.now() - lag
    found = []
    for obj in reversed(list(call.store.of_type(name).values())):
        seen = obj
        if lag:
            index = call.store.index.get(obj["id"], [(float("-inf"), obj)])
            seen = next((old for since, old in reversed(index) if since <= known_until), None)
            if seen is None:
                continue
        if (any if any_of else all)(holds(clause, seen) for clause in clauses):
            found.append(obj)

    start = 0
    if given.get("page"):
        last = given["page"]
        ids = [obj["id"] for obj in found]
        if last not in ids:
            raise errors.invalid("Invalid page token", param="page")
        start = ids.index(last) + 1
    data = found[start:start + limit]
    more = len(found) > start + limit
    expand = list(given.get("expand", ()))
    answer = {"object": "search_result", "data": data, "has_more": more,
              "next_page": data[-1]["id"] if more else None, "url": url}
    if "total_count" in expand:
        expand.remove("total_count")
        answer["total_count"] = len(found)
    return call.shown(answer, expand)
