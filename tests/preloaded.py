"""`loco-det` and `python` for shell scripts of tests: a process that has imported torch is forked for each command.

    python preloaded.py SOCKET                  the server; it ends when its standard input does
    python preloaded.py SOCKET run WORDS...     a command: `python WORDS` as the server's child, with this one's files

Importing torch and torchvision takes four seconds of processor time, several times what most commands of a tutorial
take here. Tests of how a process starts or ends start their own.
"""

import json
import os
import socket
import sys


def run(path: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        told = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(connection, [len(told).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(told)
        ended = connection.recv(1)
    return ended[0] if ended else 137  # it was killed


def serve(path: str) -> None:
    import select
    import signal

    from loco_det.commands import convert, data, doctor, pretrain, report, train  # noqa: F401
    from loco_det.core import launch  # noqa: F401
    from loco_det.detection import engine_torchvision  # noqa: F401
    from pretrain.train import pretrain as _

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children here
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.bound")
        server.listen()
        os.rename(f"{path}.bound", path)  # only now, so that whoever finds it is answered
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = server.accept()
            with connection:
                if os.fork() == 0:
                    server.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    child(connection)


def child(connection: socket.socket) -> None:
    """Become the command; never returns."""
    size, files, _, _ = socket.recv_fds(connection, 4, 3)
    told = b""
    while len(told) < int.from_bytes(size, "big"):
        told += connection.recv(1 << 16)
    words, folder, environment = json.loads(told)
    for wanted, file in enumerate(files):
        os.dup2(file, wanted)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    status = status_of(words)
    for file in (sys.stdout, sys.stderr):
        file.flush()
    connection.sendall(bytes([status]))
    os._exit(status)


def status_of(words: list[str]) -> int:
    import runpy
    import traceback

    try:
        if words[:1] == ["-c"]:
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[:1] == ["-m"]:
            sys.argv, sys.path[0] = words[1:], ""
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words == ["-"]:
            sys.argv, sys.path[0] = ["-"], ""
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 255
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[2:3] == ["run"]:
        sys.exit(run(sys.argv[1], sys.argv[3:]))
    serve(sys.argv[1])
