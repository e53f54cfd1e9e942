// Comes after a kernel's file: lets replay.cpp call the kernel HOST_ENTRY without knowing its argument struct.
#pragma once
#include "kernel.h"

template <class Arguments> static size_t size_of_arguments(void (*)(Arguments)) { return sizeof(Arguments); }
template <class Arguments> static void call(void (*kernel)(Arguments), const void *arguments) {
    kernel(*(const Arguments *)arguments);
}

size_t host::kernel_argument_bytes() { return size_of_arguments(HOST_ENTRY); }
void host::kernel(const void *arguments) { call(HOST_ENTRY, arguments); }
