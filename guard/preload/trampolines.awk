# Makes the x86-64 trampolines of the names in libcuda_symbols.txt. A trampoline touches r10 and r11 only, which no
# caller of a C function expects anything of, so every argument arrives as it was given.
function kind_of(name,   base, kind) {
  base = name
  sub(/_ptsz$/, "", base)
  if (!(base in stream)) return -1
  kind = stream[base]
  return name == base ? kind : kind + 8
}
function save(   i) {
  print "\tpushq %rbp\n\t.cfi_adjust_cfa_offset 8\n\t.cfi_rel_offset %rbp, 0\n\tmovq %rsp, %rbp\n\t.cfi_def_cfa_register %rbp"
  print "\tsubq $208, %rsp"
  for (i = 1; i <= 8; i++) printf "\tmovq %%%s, %d(%%rsp)\n", register[i], 8 * (i - 1)
  for (i = 0; i < 8; i++) printf "\tmovaps %%xmm%d, %d(%%rsp)\n", i, 80 + 16 * i
}
function restore(   i) {
  for (i = 1; i <= 8; i++) printf "\tmovq %d(%%rsp), %%%s\n", 8 * (i - 1), register[i]
  for (i = 0; i < 8; i++) printf "\tmovaps %d(%%rsp), %%xmm%d\n", 80 + 16 * i, i
  print "\tleave\n\t.cfi_def_cfa %rsp, 8\n\t.cfi_restore %rbp"
}
BEGIN {
  split("rdi rsi rdx rcx r8 r9 rax r10", register, " ")
  # In gate.cpp.
  split("cuGetProcAddress cuGetProcAddress_v2 cuMemAllocManaged", list, " ")
  for (i in list) defined[list[i]] = 1
  # Where each gated entry point has its stream: gate.cpp, capturing().
  stream["cuLaunch"] = 0; stream["cuLaunchGrid"] = 0; stream["cuLaunchCooperativeKernelMultiDevice"] = 0
  stream["cuGraphLaunch"] = 1
  stream["cuLaunchGridAsync"] = 2
  stream["cuLaunchKernel"] = 3; stream["cuLaunchCooperativeKernel"] = 3
  stream["cuLaunchKernelEx"] = 4
  print "\t.text"
  print "bulkhead_first_call:  # r10: where the address goes, r11: index\n\t.cfi_startproc"
  save()
  print "\tmovl %r11d, %edi\n\tcall bulkhead_guard_resolve\n\tmovq 56(%rsp), %r10\n\tmovq %rax, (%r10)"
  restore()
  print "\tjmp *(%r10)\n\t.cfi_endproc"
  print "bulkhead_gate_closed:  # r10: where the address is, r11: kind\n\t.cfi_startproc"
  save()
  print "\tmovl %r11d, %edi\n\tmovq %rsp, %rsi\n\tleaq 16(%rbp), %rdx\n\tcall bulkhead_guard_wait"
  restore()
  print "\tjmp *(%r10)\n\t.cfi_endproc"
}
/^cu/ {
  name[n] = $1
  own = $1 in defined
  kind = kind_of($1)
  if (own) {
    gated[n] = $1
  } else {
    printf "\t.globl %s\n\t.type %s, @function\n\t.p2align 4\n%s:\n.Ltrampoline%d:\n\t.cfi_startproc\n", $1, $1, $1, n
    if (kind >= 0) {
      printf "\tmovq bulkhead_guard_gate(%%rip), %%r11\n\tcmpl $0, (%%r11)\n\tjne 1f\n\tjmp *.Lreal%d(%%rip)\n", n
      printf "1:\tleaq .Lreal%d(%%rip), %%r10\n\tmovl $%d, %%r11d\n\tjmp bulkhead_gate_closed\n", n, kind
      gated[n] = ".Ltrampoline" n
    } else {
      printf "\tjmp *.Lreal%d(%%rip)\n", n
    }
    printf ".Llazy%d:\n\tleaq .Lreal%d(%%rip), %%r10\n\tmovl $%d, %%r11d\n\tjmp bulkhead_first_call\n", n, n, n
    printf "\t.cfi_endproc\n\t.size %s, .-%s\n", $1, $1
  }
  n++
}
END {
  print "\t.data\n\t.p2align 3"
  for (i = 0; i < n; i++) if (!(name[i] in defined)) printf ".Lreal%d:\t.quad .Llazy%d\n", i, i
  print "\t.section .data.rel.ro, \"aw\"\n\t.p2align 3\n\t.globl bulkhead_guard_names\n\t.hidden bulkhead_guard_names\nbulkhead_guard_names:"
  for (i = 0; i < n; i++) printf "\t.quad .Lname%d\n", i
  print "\t.globl bulkhead_guard_gated\n\t.hidden bulkhead_guard_gated\nbulkhead_guard_gated:"
  for (i = 0; i < n; i++) if (i in gated) printf "\t.quad .Lname%d, %s\n", i, gated[i]
  print "\t.quad 0, 0"
  print "\t.section .rodata.str1.1, \"aMS\", @progbits, 1"
  for (i = 0; i < n; i++) printf ".Lname%d:\t.string \"%s\"\n", i, name[i]
  print "\t.section .note.GNU-stack, \"\", @progbits"
}
