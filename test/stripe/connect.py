"""Transfers to connected accounts and their reversals."""

import re

import errors
from errors import refused
from routes import metadata, readable, route, updatable


@route("POST", "/v1/transfers", "transfer",
       {"amount": "amount!", "currency": "currency!", "destination": "str!", "description": "str",
        "metadata": "metadata", "source_transaction": "str", "source_type": "str",
        "transfer_group": "str"})
def create_transfer(call, given):
    meta = metadata(given)
    destination = given["destination"]
    if not re.fullmatch(r"acct_\w+", destination) or not call.world.accounts.get(destination, True):
        raise errors.missing_object("destination", destination, "destination")
    if given.get("source_transaction") and call.find("charge", given["source_transaction"]) is None:
        raise errors.missing_object("charge", given["source_transaction"], "source_transaction")
    transfer = call.new("transfer", "tr", {
        "amount": given["amount"], "amount_reversed": 0,
        "balance_transaction": call.world.new_id("txn"), "currency": given["currency"],
        "description": given.get("description"), "destination": destination,
        "destination_payment": call.world.new_id("py"), "reversed": False,
        "source_transaction": given.get("source_transaction"),
        "source_type": given.get("source_type", "card"),
        "transfer_group": given.get("transfer_group")}, meta)
    call.emit("transfer.created", transfer)
    return transfer


@route("POST", "/v1/transfers/{id}/reversals", "transfer",
       {"amount": "amount", "description": "str", "metadata": "metadata",
        "refund_application_fee": "bool"})
def create_reversal(call, given, identifier):
    meta = metadata(given)
    transfer = call.get("transfer", identifier)
    left = transfer["amount"] - transfer["amount_reversed"]
    amount = given.get("amount", left)
    if left == 0 or amount > left:
        raise refused(f"Transfer {identifier} can't be reversed by {amount}: {left} is left.",
                      param="amount")
    reversal = call.new("transfer_reversal", "trr", {
        "amount": amount, "balance_transaction": call.world.new_id("txn"),
        "currency": transfer["currency"], "transfer": identifier}, meta)
    transfer["amount_reversed"] += amount
    transfer["reversed"] = transfer["amount_reversed"] == transfer["amount"]
    call.emit("transfer.reversed", transfer)
    return reversal


@route("GET", "/v1/transfers/{id}/reversals", "transfer",
       {"limit": "int", "starting_after": "str", "ending_before": "str"})
def list_reversals(call, given, identifier):
    call.get("transfer", identifier)
    shown = {key: obj for key, obj in call.store.of_type("transfer_reversal").items()
             if obj["transfer"] == identifier}
    return call.page("transfer_reversal", given, f"/v1/transfers/{identifier}/reversals", (), shown)


readable("transfer", "/v1/transfers", ["destination", "transfer_group"])
updatable("transfer", "/v1/transfers", "transfer.updated", {"description": "str"})
