// The first process of a candidate: it runs the image's command as its child, and tells how that goes on.
//
// It listens on the port at INFO + 24 while the child runs, and afterwards on the one at INFO + 26 plus the child's exit
// code (128 and the signal's number, where a signal ended it), both at the address at INFO + 28. SIGTERM ends it, and so
// the container. INFO has: the set of SIGTERM and SIGCHLD, the addresses of the child's arguments and of the places of
// its program, both with a null pointer at their end, the ports and the address. sidecar.py has this in machine code.
        .set    INFO, 0x200
_start: ldr     x0, [sp]
        add     x19, sp, x0, lsl #3
        add     x19, x19, #16
        sub     sp, sp, #32
        mov     x28, #INFO
        movk    x28, #0x40, lsl #16
        ldrh    w20, [x28, #24]
        bl      open
        mov     w22, w21
        mov     x0, #0
        bl      mask
        mov     x0, #17
        mov     x1, #0
        mov     x2, #0
        mov     x3, #0
        mov     x4, #0
        mov     x8, #220
        svc     #0
        mov     w23, w0
        cbnz    w0, wait
        mov     x0, #1
        bl      mask
        ldr     x20, [x28, #16]
next:   ldr     x0, [x20], #8
        cbz     x0, none
        ldr     x1, [x28, #8]
        mov     x2, x19
        mov     x8, #221
        svc     #0
        b       next
none:   mov     x0, #127
        b       exit
wait:   mov     x0, x28
        mov     x1, #0
        mov     x2, #0
        mov     x3, #8
        mov     x8, #137
        svc     #0
        cmp     w0, #15
        b.eq    end
reap:   mov     x0, #-1
        mov     x1, sp
        mov     x2, #1
        mov     x3, #0
        mov     x8, #260
        svc     #0
        cmp     w0, #0
        b.le    wait
        cmp     w0, w23
        b.ne    reap
        ldr     w1, [sp]
        ubfx    w20, w1, #8, #8
        ands    w1, w1, #127
        b.eq    code
        add     w20, w1, #128
code:   ldrh    w1, [x28, #26]
        add     w20, w20, w1
        bl      open
        mov     w0, w22
        mov     x8, #57
        svc     #0
        b       reap
end:    mov     x0, #0
exit:   mov     x8, #93
        svc     #0
open:   mov     x0, #2
        mov     x1, #1
        movk    x1, #8, lsl #16
        mov     x2, #0
        mov     x8, #198
        svc     #0
        mov     w21, w0
        rev16   w20, w20
        mov     w1, #2
        strh    w1, [sp]
        strh    w20, [sp, #2]
        ldr     w1, [x28, #28]
        str     w1, [sp, #4]
        str     xzr, [sp, #8]
        mov     w0, w21
        mov     x1, sp
        mov     x2, #16
        mov     x8, #200
        svc     #0
        mov     w0, w21
        mov     x1, #1
        mov     x8, #201
        svc     #0
        ret
mask:   mov     x1, x28
        mov     x2, #0
        mov     x3, #8
        mov     x8, #135
        svc     #0
        ret
