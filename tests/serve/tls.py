#!/usr/bin/env python3
"""TLS as outsiders see it (openssl s_client, curl): 1.3 alone, certificates of clients (right, of a wrong CA, expired, not
registered, revoked), the self-made certificate, a new one at SIGHUP."""
import os
import re
import signal
import stat
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from daemon import PREFIX, Checks, Daemon, Place, wait_for  # noqa: E402


def openssl(*words, data=b"", check=True):
    return subprocess.run(["openssl", *words], input=data, capture_output=True, check=check, timeout=30)


def authority(work, name):
    base = os.path.join(work, name)
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", base + ".key", "-out", base + ".crt", "-days", "2", "-subj", "/CN=" + name)
    return base


def client(work, ca, name, days=2, start=None):
    """A client certificate; (certificate, key, SHA-256)."""
    base = os.path.join(work, name)
    openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", base + ".key", "-out", base + ".csr", "-subj", "/CN=" + name)
    if start is None:
        openssl("x509", "-req", "-in", base + ".csr", "-CA", ca + ".crt", "-CAkey", ca + ".key", "-CAcreateserial", "-out", base + ".crt", "-days", str(days))
    else:  # over already: `openssl ca` alone can say when it began
        index = os.path.join(work, name + ".db")
        open(index, "w").close()
        with open(index + ".cnf", "w") as out:
            out.write("[ca]\ndefault_ca=d\n[d]\ndatabase=%s\nnew_certs_dir=%s\nserial=%s\ndefault_md=sha256\npolicy=p\nunique_subject=no\n[p]\ncommonName=supplied\n" % (index, work, index + ".serial"))
        with open(index + ".serial", "w") as out:
            out.write("1000\n")
        openssl("ca", "-batch", "-config", index + ".cnf", "-in", base + ".csr", "-cert", ca + ".crt", "-keyfile", ca + ".key", "-out", base + ".crt",
                "-startdate", "20200101000000Z", "-enddate", "20200201000000Z")
    der = openssl("x509", "-in", base + ".crt", "-outform", "DER").stdout
    import hashlib
    return base + ".crt", base + ".key", hashlib.sha256(der).hexdigest()


def s_client(daemon, *words):
    return openssl("s_client", "-connect", "127.0.0.1:%d" % daemon.port, *words, data=b"GET /healthz HTTP/1.0\r\n\r\n", check=False)


def curl(daemon, path, *words):
    done = subprocess.run(["curl", "-sS", "--max-time", "10", "-o", "-", "-w", "\n%{http_code}", *words, daemon.url + path], capture_output=True, text=True)
    body, _, code = done.stdout.rpartition("\n")
    return int(code or 0), body, done.stderr


def main():
    checks = Checks()
    check = checks.check
    with Place() as place:
        daemon = place.daemon
        said = s_client(daemon, "-tls1_3", "-brief").stderr.decode()
        check("TLS 1.3 is spoken", "TLSv1.3" in said, said)
        for version in ("-tls1_2", "-tls1_1", "-tls1"):
            done = s_client(daemon, version, "-cipher", "ALL:@SECLEVEL=0")
            text = (done.stdout + done.stderr).decode()
            check("%s is refused" % version[1:], done.returncode != 0 and "Cipher is (NONE)" in text or "alert protocol version" in text or "no protocols" in text, text[-600:])
        text = s_client(daemon, "-tls1_3", "-ciphersuites", "TLS_AES_128_CCM_8_SHA256").stdout.decode()
        check("a weak suite of TLS 1.3 is refused", "Cipher is (NONE)" in text, text[-300:])
        text = s_client(daemon, "-tls1_3").stdout.decode()
        check("no early data is offered", "Max Early Data: 0" in text or "Max Early Data" not in text, text[-800:])
        certificate = openssl("x509", "-in", daemon.certificate, "-noout", "-text").stdout.decode()
        check("the self-made certificate: P-256, for localhost and 127.0.0.1", "prime256v1" in certificate and "DNS:localhost" in certificate and "IP Address:127.0.0.1" in certificate, certificate)
        key = [name for name in os.listdir(daemon.state) if name.endswith(".key")]
        check("its key is readable by nobody else", key and stat.S_IMODE(os.stat(os.path.join(daemon.state, key[0])).st_mode) == 0o600, key)
        check("the state directory is nobody else's", stat.S_IMODE(os.stat(daemon.state).st_mode) & 0o077 == 0, oct(os.stat(daemon.state).st_mode))
        loose = [name for name in os.listdir(daemon.state) if stat.S_IMODE(os.stat(os.path.join(daemon.state, name)).st_mode) & 0o027 and not name.endswith(".crt")]
        check("nor is anything in it but the certificate", not loose, loose)
        code, body, error = curl(daemon, "/healthz", "--cacert", daemon.certificate)
        check("curl trusts it with --cacert", code == 200, code, error)
        code, body, error = curl(daemon, "/healthz")
        check("and not without", code == 0 and "certificate" in error, code, error)
        done = subprocess.run(["curl", "-sS", "--max-time", "5", "http://127.0.0.1:%d/healthz" % daemon.port], capture_output=True, text=True)
        check("plain HTTP is told to write https://", "https://" in done.stdout, done.stdout, done.stderr)
        wrong = authority(place.work, "another")
        done = s_client(daemon, "-CAfile", wrong + ".crt", "-verify_return_error")
        check("a client that trusts another CA ends the handshake", done.returncode != 0)
        first = openssl("x509", "-in", daemon.certificate, "-noout", "-serial").stdout
        check("a restart keeps the certificate", daemon.stop() == 0 and daemon.start() and openssl("x509", "-in", daemon.certificate, "-noout", "-serial").stdout == first)
        daemon.stop()

        # ---- certificates of our own, and of clients
        good = authority(place.work, "good")
        server = authority(place.work, "server")  # self-signed, for 127.0.0.1

        def new_server_certificate():
            openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", server + ".key.new", "-out", server + ".crt.new",
                    "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
            os.rename(server + ".key.new", server + ".key")
            os.rename(server + ".crt.new", server + ".crt")
        new_server_certificate()
        daemon = place.daemon = Daemon(place.twin, place.work, "certificate: %s\nkey: %s\nclient_ca: %s\n" % (server + ".crt", server + ".key", good + ".crt"))
        daemon.start()
        known, other = client(place.work, good, "known"), client(place.work, good, "other")
        stranger, over = client(place.work, wrong, "stranger"), client(place.work, good, "over", start=True)
        self_made = authority(place.work, "selfmade")
        daemon.tenant("blue")
        for one in (known, stranger, over):
            answer = daemon.local().ask("POST", PREFIX + "/tokens", {"user": os.path.basename(one[0]), "role": "tenant", "tenant": "blue", "certificate": one[2]})
            if one is known:
                check("a client certificate is registered, and no secret made", answer.status == 201 and "secret" not in answer.json() and answer.json().get("certificate") is True, answer.body)
                registered = answer.json()

        def whoami(certificate, key):
            return curl(daemon, PREFIX + "/whoami", "--cacert", server + ".crt", "--cert", certificate, "--key", key)
        code, body, error = whoami(*known[:2])
        check("a registered client certificate says who asks", code == 200 and '"known.crt"' in body and '"blue"' in body.replace(" ", ""), code, body, error)
        code, body, error = whoami(*other[:2])
        check("a certificate of the CA that nobody registered is nobody", code == 401, code, body, error)
        code, body, error = whoami(*stranger[:2])
        check("a certificate of another CA, though registered, is nobody", code in (0, 401) and "blue" not in body, code, body, error)
        code, body, error = whoami(self_made + ".crt", self_made + ".key")
        check("a self-signed one is nobody", code in (0, 401), code, body, error)
        code, body, error = whoami(*over[:2])
        check("an expired one, though registered, is nobody", code in (0, 401) and "blue" not in body, code, body, error)
        code, body, error = curl(daemon, PREFIX + "/whoami", "--cacert", server + ".crt")
        check("without a certificate a token is still asked for", code == 401, code, body, error)
        token = daemon.token("operator")["secret"]
        code, body, error = curl(daemon, PREFIX + "/whoami", "--cacert", server + ".crt", "-H", "Authorization: Bearer " + token)
        check("and enough", code == 200, code, body, error)
        code, body, error = curl(daemon, PREFIX + "/whoami", "--cacert", server + ".crt", "--cert", known[0], "--key", known[1], "-H", "Authorization: Bearer bh_no_" + "0" * 64)
        check("a bad token beside a good certificate is refused, not passed over", code == 401, code, body, error)
        done = openssl("s_client", "-connect", "127.0.0.1:%d" % daemon.port, "-cert", stranger[0], "-key", stranger[1], "-CAfile", server + ".crt", "-ign_eof",
                       data=b"GET /api/v1/whoami HTTP/1.0\r\n\r\n", check=False)
        check("openssl s_client with the wrong CA's certificate: an alert or 401", b" 401 " in done.stdout or b"alert" in done.stderr, done.stdout[-300:], done.stderr[-300:])
        daemon.local().ask("DELETE", PREFIX + "/tokens/" + registered["id"])
        code, body, error = whoami(*known[:2])
        check("revoked, it is nobody at once", code == 401, code, body, error)

        # ---- a new certificate without a restart
        def serial():
            return re.search(rb"-----BEGIN.*?-----END", s_client(daemon).stdout, re.S)[0]
        before, pid = serial(), daemon.process.pid
        new_server_certificate()
        daemon.process.send_signal(signal.SIGHUP)
        check("SIGHUP takes the new certificate", wait_for(lambda: serial() != before, 5) and daemon.process.poll() is None and daemon.process.pid == pid, daemon.said())
        before = serial()
        with open(server + ".crt", "w") as out:
            out.write("no certificate\n")
        daemon.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        check("a broken file at SIGHUP is reported, and the old certificate stays", daemon.process.poll() is None and serial() == before and server + ".crt" in daemon.said(), daemon.said())
        daemon.stop()
        try:
            daemon.start(wait=5)
            check("a start with a broken certificate is refused", False)
        except RuntimeError as why:
            check("a start with a broken certificate is refused, with the file's name", server in str(why) and "ended with" in str(why), why)
    checks.done()


if __name__ == "__main__":
    main()
