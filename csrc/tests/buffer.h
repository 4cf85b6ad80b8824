// Memory of exactly the asked size, aligned as the library wants it and zeroed, so that a sanitizer
// sees every byte too many.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

template <typename T>
struct Buffer {
    explicit Buffer(int64_t count) : size(count) {
        const size_t num_bytes = (count * sizeof(T) + 63) / 64 * 64;
        data = static_cast<T*>(std::aligned_alloc(64, num_bytes));
        memset(data, 0, num_bytes);
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T& operator[](int64_t i) { return data[i]; }
    int64_t size;
    T* data;
};
