"""Parameters: the form encoding of API v1, and what an endpoint accepts."""

import re
from urllib.parse import unquote_to_bytes

from errors import invalid

NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)\Z")
MAX_DEPTH = 10


def decode_form(text):
    """a[b][c]=1&d[]=2 as nested dictionaries; lists are {"0": ...} until asked for."""
    result = {}
    for pair in text.split("&"):
        if not pair:
            continue
        name, _, value = pair.partition("=")
        name, value = unquote(name), unquote(value)
        match = NAME.match(name)
        if not match:
            raise invalid(f"Invalid parameter name: {name}", param=name, code="parameter_unknown")
        path = [match[1]] + re.findall(r"\[([^\]]*)\]", match[2])
        if len(path) > MAX_DEPTH:
            raise invalid("Invalid request: parameters are nested too deep", param=match[1])
        at = result
        for here, following in zip(path, path[1:] + [None]):
            if here == "":
                here = str(len(at))
            if following is None:
                if isinstance(at.get(here), dict):
                    raise invalid("Invalid hash", param=match[1])
                at[here] = value
            else:
                at = at.setdefault(here, {})
                if not isinstance(at, dict):
                    raise invalid("Invalid hash", param=match[1])
    return result


def unquote(text):
    try:
        return unquote_to_bytes(text.replace("+", " ")).decode("utf-8")
    except UnicodeDecodeError:
        raise invalid("Invalid request: the parameters are no UTF-8") from None


def as_list(value, param):
    if value == "":
        return []
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and all(name.isdigit() for name in value):
        return [value[name] for name in sorted(value, key=int)]
    raise invalid("Invalid array", param=param)


def integer(value, param):
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    raise invalid(f"Invalid integer: {value}", param=param, code="parameter_invalid_integer")


def amount(value, param):
    number = integer(value, param)
    if number < 1:
        raise invalid("This value must be greater than or equal to 1.", param=param,
                      code="parameter_invalid_integer")
    if number > 99999999:
        raise invalid("Amount must be no more than $999,999.99", param=param,
                      code="amount_too_large")
    return number


def boolean(value, param):
    # older versions of Stripe's library for Python send "True"
    if value in (True, "true", "True"):
        return True
    if value in (False, "false", "False"):
        return False
    raise invalid(f"Invalid boolean: {value}", param=param)


def string(value, param):
    if not isinstance(value, str):
        raise invalid("Invalid string", param=param)
    if len(value) > 5000:
        raise invalid(f"Invalid string: {value[:20]}...; must be at most 5000 characters", param=param)
    return value or None


def currency(value, param):
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z]{3}", value):
        raise invalid(f"Invalid currency: {value}. Stripe supports currencies of three letters "
                      "(ISO 4217).", param=param)
    return value.lower()


def hash_(value, param):
    if not isinstance(value, dict):
        raise invalid("Invalid hash", param=param)
    return value


def anything(value, param):
    return value


KINDS = {"int": integer, "amount": amount, "bool": boolean, "str": string, "currency": currency,
         "hash": hash_, "list": as_list, "any": anything, "metadata": anything}


EMPTIABLE = ("metadata", "any", "list")


def accept(given, accepted, creates=False):
    """
    Check parameters against {name: kind}; "kind!" must be there.  An empty value is
    to unset one, which has no sense where something is created.
    """
    result = {}
    for name in given:
        if name not in accepted and name != "expand":
            raise invalid(f"Received unknown parameter: {name}", param=name, code="parameter_unknown")
    for name, kind in accepted.items():
        if given.get(name) == "" and (kind.endswith("!") or creates and kind not in EMPTIABLE):
            raise invalid(f"You passed an empty string for '{name}'. We assume empty values are "
                          f"an attempt to unset a parameter; however '{name}' cannot be unset. You "
                          f"should remove '{name}' from your request or supply a non-empty value.",
                          param=name, code="parameter_invalid_empty")
        if name in given:
            result[name] = KINDS[kind.rstrip("!")](given[name], name)
        if kind.endswith("!") and result.get(name) is None:
            raise invalid(f"Missing required param: {name}.", param=name, code="parameter_missing")
    if "expand" in given:
        result["expand"] = as_list(given["expand"], "expand")
    return result


def merged_metadata(old, given, unset=""):
    """Metadata after an update: an empty value (API v2: null) removes its key."""
    if given is None or given == unset or given == "":
        return {}
    if not isinstance(given, dict):
        raise invalid("Invalid hash", param="metadata")
    result = dict(old)
    for name, value in given.items():
        if value == unset or value is None:
            result.pop(name, None)
            continue
        if not isinstance(value, str):
            raise invalid("Invalid string", param=f"metadata[{name}]")
        if len(name) > 40:
            raise invalid(f"Invalid metadata key {name}: at most 40 characters", param="metadata")
        if len(value) > 500:
            raise invalid("Metadata values can have up to 500 characters, but you passed in a value "
                          f"that is {len(value)} characters.", param=f"metadata[{name}]")
        result[name] = value
    if len(result) > 50:
        raise invalid("Metadata can have at most 50 keys", param="metadata")
    return result
