// The kernel's seccomp listener: a filter that stops a program at chosen system calls until a supervisor answers.
// Thin: it installs, receives and answers; it never chooses.
#pragma once
