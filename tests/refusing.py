"""Runs a command whose kernel refuses system calls, as an old kernel or a container would: `python refusing.py NAME,... COMMAND ...`.

A seccomp filter does it, so what the command meets is a real refusal. Leaves with 77 where there is no seccomp (qemu-user).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from typing import Final

NOT_HERE: Final = 77

# name: number by architecture (syscalls(2)), which argument tells, under which mask, is what, and the error
_X86, _ARM = "x86_64", "aarch64"
CALLS: Final = {
    "O_DIRECT": ({_X86: 257, _ARM: 56}, 2, os.O_DIRECT, os.O_DIRECT, errno.EINVAL),
    "statx": ({_X86: 332, _ARM: 291}, 0, 0, 0, errno.ENOSYS),
    "populate": ({_X86: 28, _ARM: 233}, 2, 0xFFFFFFFF, 22, errno.EINVAL),
    "hugepage": ({_X86: 28, _ARM: 233}, 2, 0xFFFFFFFF, 14, errno.EINVAL),
    "fadvise": ({_X86: 221, _ARM: 223}, 0, 0, 0, errno.ENOSYS),
    "affinity": ({_X86: 204, _ARM: 123}, 0, 0, 0, errno.EPERM),
    "scheduling": ({_X86: 144, _ARM: 119}, 0, 0, 0, errno.EPERM),
    "ionice": ({_X86: 251, _ARM: 30}, 0, 0, 0, errno.EPERM),
    "nice": ({_X86: 141, _ARM: 140}, 0, 0, 0, errno.EPERM),
    "io_uring": ({_X86: 425, _ARM: 425}, 0, 0, 0, errno.ENOSYS),
}  # fmt: skip


def program(name: str) -> bytes:
    """struct sock_filter[]: fail if (argument & mask) == value, else allow."""
    numbers, argument, mask, value, error = CALLS[name]
    load, equal, mask_with, leave = 0x20, 0x15, 0x54, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_ALU|AND|K, BPF_RET|K
    return b"".join(
        struct.pack("=HBBI", *step)
        for step in [
            (load, 0, 0, 0),
            (equal, 0, 4, numbers[platform.machine()]),
            (load, 0, 0, 16 + 8 * argument),
            (mask_with, 0, 0, mask),
            (equal, 0, 1, value),
            (leave, 0, 0, 0x00050000 | error),  # SECCOMP_RET_ERRNO
            (leave, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        ]
    )


def refuse(names: list[str]) -> bool:
    """From now on, for this process and what it starts; False where there is no seccomp."""
    libc = ctypes.CDLL(None, use_errno=True)
    if platform.machine() not in (_X86, _ARM) or libc.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        return False
    for name in names:
        code = program(name)
        buffer = ctypes.create_string_buffer(code, len(code))
        filter_ = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(buffer)))
        if libc.prctl(22, 2, ctypes.byref(filter_)) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
            return False
    return True


if __name__ == "__main__":
    if not refuse(sys.argv[1].split(",")):
        sys.exit(NOT_HERE)
    os.execvp(sys.argv[2], sys.argv[2:])
