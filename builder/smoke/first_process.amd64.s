# The first process of a candidate: it runs the image's command as its child, and tells how that goes on.
#
# It listens on the port at INFO + 24 while the child runs, and afterwards on the one at INFO + 26 plus the child's exit
# code (128 and the signal's number, where a signal ended it), both at the address at INFO + 28. SIGTERM ends it, and so
# the container. INFO has: the set of SIGTERM and SIGCHLD, the addresses of the child's arguments and of the places of
# its program, both with a null pointer at their end, the ports and the address. sidecar.py has this in machine code.
        .intel_syntax noprefix
        .set    INFO, 0x400200
_start: mov     rax, [rsp]
        lea     r12, [rsp + rax*8 + 16]
        sub     rsp, 32
        movzx   ebx, word ptr [INFO + 24]
        call    open
        mov     r14d, r13d
        xor     edi, edi
        call    mask
        mov     eax, 57
        syscall
        mov     r15d, eax
        test    eax, eax
        jnz     wait
        mov     edi, 1
        call    mask
        mov     ebx, [INFO + 16]
next:   mov     rdi, [rbx]
        test    rdi, rdi
        jz      none
        mov     esi, [INFO + 8]
        mov     rdx, r12
        mov     eax, 59
        syscall
        add     rbx, 8
        jmp     next
none:   mov     edi, 127
        jmp     exit
wait:   mov     edi, INFO
        xor     esi, esi
        xor     edx, edx
        mov     r10d, 8
        mov     eax, 128
        syscall
        cmp     eax, 15
        je      end
reap:   mov     edi, -1
        mov     rsi, rsp
        mov     edx, 1
        xor     r10d, r10d
        mov     eax, 61
        syscall
        test    eax, eax
        jle     wait
        cmp     eax, r15d
        jne     reap
        mov     ebx, [rsp]
        mov     ecx, ebx
        shr     ebx, 8
        and     ebx, 255
        and     ecx, 127
        jz      code
        lea     ebx, [rcx + 128]
code:   movzx   ecx, word ptr [INFO + 26]
        add     ebx, ecx
        call    open
        mov     edi, r14d
        mov     eax, 3
        syscall
        jmp     reap
end:    xor     edi, edi
exit:   mov     eax, 60
        syscall
open:   mov     edi, 2
        mov     esi, 0x80001
        xor     edx, edx
        mov     eax, 41
        syscall
        mov     r13d, eax
        mov     dword ptr [rsp + 8], 2
        rol     bx, 8
        mov     [rsp + 10], bx
        mov     eax, [INFO + 28]
        mov     [rsp + 12], eax
        xor     eax, eax
        mov     [rsp + 16], rax
        mov     edi, r13d
        lea     rsi, [rsp + 8]
        mov     edx, 16
        mov     eax, 49
        syscall
        mov     edi, r13d
        mov     esi, 1
        mov     eax, 50
        syscall
        ret
mask:   mov     esi, INFO
        xor     edx, edx
        mov     r10d, 8
        mov     eax, 14
        syscall
        ret
