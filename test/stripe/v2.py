"""API v2: outbound payments and event destinations.

JSON in and out, times as text, keys on DELETE as well.  What its keys mean is
in idempotency.py.
"""

import datetime
import re

import errors
from errors import invalid
from params import merged_metadata
from routes import route


def timestamp(call):
    moment = datetime.datetime.fromtimestamp(call.now, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def accept(given, required, optional):
    for name in given:
        if name not in required and name not in optional:
            raise invalid(f"Received unknown parameter: {name}", param=name,
                          code="unknown_parameter")
    for name in required:
        if given.get(name) in (None, ""):
            raise invalid(f"Missing required field: {name}", param=name, code="missing_field")


def page(call, name, given, base):
    limit = given.get("limit", "20")
    if not re.fullmatch(r"[0-9]{1,3}", limit) or not 1 <= int(limit) <= 100:
        raise invalid("limit must be between 1 and 100", param="limit")
    found = list(reversed(call.store.of_type(name).values()))
    if given.get("page"):
        ids = [obj["id"] for obj in found]
        if given["page"] not in ids:
            raise invalid("Invalid page token", param="page")
        found = found[ids.index(given["page"]) + 1:]
    data = found[:int(limit)]
    more = len(found) > len(data)
    return {"data": data, "previous_page_url": None,
            "next_page_url": f"{base}?limit={limit}&page={data[-1]['id']}" if more else None}


PAYMENTS = "/v2/money_management/outbound_payments"
PAYMENT = "v2.money_management.outbound_payment"


@route("POST", PAYMENTS, "outbound_payment")
def create_outbound_payment(call, given):
    accept(given, ("from", "to", "amount"),
           ("description", "metadata", "statement_descriptor", "recipient_notification",
            "delivery_options"))
    amount, source, to = given["amount"], given["from"], given["to"]
    if not (isinstance(amount, dict) and isinstance(amount.get("value"), int) and amount["value"] > 0
            and re.fullmatch(r"[a-z]{3}", str(amount.get("currency")))):
        raise invalid("Invalid amount: a value (an integer) and a currency", param="amount")
    if not isinstance(source, dict) or not source.get("financial_account"):
        raise invalid("Missing required field: from.financial_account", param="from")
    if not isinstance(to, dict) or not to.get("recipient"):
        raise invalid("Missing required field: to.recipient", param="to")
    meta = merged_metadata({}, given.get("metadata"), unset=None)
    if "insufficient" in source["financial_account"]:
        raise errors.ApiError(400, "insufficient_funds",
                              "The financial account doesn't have enough funds.",
                              code="outbound_payment_insufficient_funds")
    return call.new(PAYMENT, "obp", {"amount": amount, "description": given.get("description"),
                                     "from": source, "to": to, "status": "processing"},
                    meta, created=timestamp(call))


@route("GET", PAYMENTS, "outbound_payment", {"limit": "str", "page": "str"})
def list_outbound_payments(call, given):
    return page(call, PAYMENT, given, PAYMENTS)


@route("GET", PAYMENTS + "/{id}", "outbound_payment")
def retrieve_outbound_payment(call, given, identifier):
    return call.get(PAYMENT, identifier)


@route("POST", PAYMENTS + "/{id}/cancel", "outbound_payment")
def cancel_outbound_payment(call, given, identifier):
    payment = call.get(PAYMENT, identifier)
    if payment["status"] != "processing":
        raise errors.ApiError(400, "not_cancelable", "This outbound payment can't be canceled.",
                              code="outbound_payment_not_cancelable")
    payment["status"] = "canceled"
    call.effect("cancel", payment)
    return payment


DESTINATIONS = "/v2/core/event_destinations"
DESTINATION = "v2.core.event_destination"


@route("POST", DESTINATIONS, "event_destination")
def create_destination(call, given):
    accept(given, ("name", "type", "event_payload", "enabled_events"),
           ("description", "metadata", "webhook_endpoint", "amazon_eventbridge", "events_from",
            "snapshot_api_version", "include"))
    meta = merged_metadata({}, given.get("metadata"), unset=None)
    return call.new(DESTINATION, "ed_live" if call.livemode else "ed_test", {
        "description": given.get("description"), "enabled_events": given["enabled_events"],
        "event_payload": given["event_payload"], "name": given["name"], "status": "enabled",
        "type": given["type"]}, meta, created=timestamp(call))


@route("GET", DESTINATIONS, "event_destination", {"limit": "str", "page": "str"})
def list_destinations(call, given):
    return page(call, DESTINATION, given, DESTINATIONS)


@route("GET", DESTINATIONS + "/{id}", "event_destination")
def retrieve_destination(call, given, identifier):
    return call.get(DESTINATION, identifier)


@route("POST", DESTINATIONS + "/{id}", "event_destination")
def update_destination(call, given, identifier):
    accept(given, (), ("name", "description", "enabled_events", "metadata"))
    destination = call.get(DESTINATION, identifier)
    meta = merged_metadata(destination["metadata"], given.get("metadata", {}), unset=None)
    destination.update({name: value for name, value in given.items() if name != "metadata"},
                       metadata=meta)
    call.effect("update", destination)
    return destination


@route("DELETE", DESTINATIONS + "/{id}", "event_destination")
def delete_destination(call, given, identifier):
    destination = call.get(DESTINATION, identifier)
    call.store.remove(destination)
    call.effect("delete", destination)
    return {"id": identifier, "object": DESTINATION, "deleted": True}
