"""Certificates for loopback, made by openssl at every start.

    ca.pem          the authority a client should trust
    right           for localhost and 127.0.0.1, signed by it
    wrong_host      signed by it, for another host
    unknown_ca      for localhost and 127.0.0.1, signed by itself
    expired         signed by it, out of date since yesterday
"""

import os
import ssl
import subprocess

HERE = "subjectAltName=DNS:localhost,IP:127.0.0.1"
ELSEWHERE = "subjectAltName=DNS:elsewhere.example"
CERTIFICATES = ("right", "wrong_host", "unknown_ca", "expired")


def openssl(directory, *arguments):
    done = subprocess.run(["openssl", *arguments], cwd=directory, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    if done.returncode != 0:
        raise SystemExit(f"openssl {' '.join(arguments)}:\n{done.stdout}")


def new_key():
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make(directory):
    """Make them all, and return {name: SSLContext}."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    openssl(directory, "req", "-x509", *new_key(), "-keyout", "ca.key", "-out", "ca.pem",
            "-days", "2", "-subj", "/CN=fake Stripe, for tests",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    with open(os.path.join(directory, "ca.cnf"), "w", encoding="ascii") as conf:
        conf.write("[ca]\ndefault_ca=fake\n[fake]\ndatabase=index.txt\nnew_certs_dir=.\n"
                   "rand_serial=yes\ndefault_md=sha256\npolicy=any\ncopy_extensions=copy\n"
                   "unique_subject=no\n[any]\ncommonName=supplied\n")
    with open(os.path.join(directory, "index.txt"), "w", encoding="ascii"):
        pass
    for name in CERTIFICATES:
        names = ELSEWHERE if name == "wrong_host" else HERE
        subject = "/CN=elsewhere.example" if name == "wrong_host" else "/CN=localhost"
        if name == "unknown_ca":
            openssl(directory, "req", "-x509", *new_key(), "-keyout", f"{name}.key",
                    "-out", f"{name}.pem", "-days", "2", "-subj", subject, "-addext", names)
            continue
        openssl(directory, "req", "-new", *new_key(), "-keyout", f"{name}.key",
                "-out", f"{name}.csr", "-subj", subject, "-addext", names)
        dates = (("-startdate", "20200101000000Z", "-enddate", "20200102000000Z")
                 if name == "expired" else ("-days", "2"))
        openssl(directory, "ca", "-config", "ca.cnf", "-batch", "-notext", "-cert", "ca.pem",
                "-keyfile", "ca.key", "-in", f"{name}.csr", "-out", f"{name}.pem", *dates)
    contexts = {}
    for name in CERTIFICATES:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(os.path.join(directory, f"{name}.pem"),
                                os.path.join(directory, f"{name}.key"))
        contexts[name] = context
    return contexts
