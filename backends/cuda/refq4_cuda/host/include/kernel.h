// The one kernel of this program, as entry.h defines it and replay.cpp calls it.
#pragma once
#include <stddef.h>

namespace host {

size_t kernel_argument_bytes();
void kernel(const void *arguments);

}  // namespace host
