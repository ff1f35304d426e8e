// Pointers that know what they point into, for cuda_on_cpu.h.
//
// Global<T> checks every index against the size of its array.  Shared<T> also keeps, for every
// 2 bytes of shared memory, who touched them since the last barrier: two threads that touch the
// same bytes with no barrier between them, one of them writing, are a data race, and are
// reported even where this run's order happened to give the right result.
//
// -DUNCHECKED makes both plain pointers again.
#pragma once

#ifdef UNCHECKED

template <typename T>
using Global = T*;
template <typename T>
using Shared = T*;

template <typename T>
Global<T> global_array(void* data, int64_t, const char*) {
    return static_cast<T*>(data);
}

#else

namespace cpu {

[[noreturn]] inline void out_of_bounds(const char* array, int64_t index, int64_t size) {
    fail(std::string(array) + "[" + std::to_string(index) + "] is out of bounds: it has " +
         std::to_string(size) + " elements");
}

}  // namespace cpu

template <typename T>
class Global {
public:
    Global() = default;
    Global(T* data, int64_t size, const char* name) : data_(data), size_(size), name_(name) {}
    template <typename U>  // Global<float> is a Global<const float>
    Global(const Global<U>& other)
        : data_(other.range(0, 0)), size_(other.size()), name_(other.name()) {}

    T& operator[](int64_t index) const { return *range(index, 1); }

    // Where `count` elements from `index` on lie, all of them in bounds.
    T* range(int64_t index, int64_t count) const {
        if (index < 0 || index + count > size_)
            cpu::out_of_bounds(name_, index < 0 ? index : index + count - 1, size_);
        return data_ + index;
    }
    int64_t size() const { return size_; }
    const char* name() const { return name_; }

private:
    T* data_ = nullptr;
    int64_t size_ = 0;
    const char* name_ = "";
};

template <typename T>
Global<T> global_array(void* data, int64_t size, const char* name) {
    return Global<T>(static_cast<T*>(data), size, name);
}

namespace cpu {

// One access: by which thread, and after how many barriers of the block and of its warp.
struct Access {
    int thread = -1;
    uint32_t barriers = 0, warp_barriers = 0;
};

// What happened to 2 bytes of shared memory in this thread block.  Two readers are enough, of two
// warps if two have read since the last barrier: of whatever thread writes next, the other is not.
struct Shadow {
    Access writer, readers[2];
};
inline std::vector<Shadow> shadow;

inline Access access_now() {
    return {gpu.thread, gpu.barriers, gpu.warp_barriers[gpu.thread / WARP]};
}

inline bool in_this_block(const Access& access) {
    return access.thread >= 0 && access.barriers >= gpu.first_barrier;
}

// Whether nothing orders the earlier access before the one that happens now.
inline bool is_race(const Access& earlier, const Access& now) {
    if (!in_this_block(earlier) || earlier.thread == now.thread) return false;
    if (earlier.barriers != now.barriers) return false;
    return earlier.thread / WARP != now.thread / WARP || earlier.warp_barriers == now.warp_barriers;
}

[[noreturn]] inline void race(const char* array, int64_t index, const Access& other, bool wrote,
                              bool writes) {
    fail("data race on " + std::string(array) + "[" + std::to_string(index) + "]: thread " +
         std::to_string(other.thread) + (wrote ? " wrote" : " read") + " it, thread " +
         std::to_string(gpu.thread) + (writes ? " writes" : " reads") +
         " it, and no barrier is between them");
}

// Whether the last reader is to be kept beside the one of now, or gives way to it: the same
// thread, or one of its warp while the other reader is of another.
inline bool keeps_last(const Shadow& cell, const Access& now) {
    const auto& [last, other] = cell.readers;
    if (last.thread == now.thread) return false;
    return last.thread / WARP != now.thread / WARP || other.thread / WARP == now.thread / WARP ||
           !in_this_block(other) || other.barriers != now.barriers;
}

inline void note_read(size_t byte, size_t bytes, const char* array, int64_t index) {
    const Access now = access_now();
    for (size_t i = byte / 2; i < (byte + bytes) / 2; i++) {
        Shadow& cell = shadow[i];
        if (!in_this_block(cell.writer))
            fail("reads " + std::string(array) + "[" + std::to_string(index) +
                 "] of shared memory, which nobody wrote");
        if (is_race(cell.writer, now)) race(array, index, cell.writer, true, false);
        if (keeps_last(cell, now)) cell.readers[1] = cell.readers[0];
        cell.readers[0] = now;
    }
}

inline void note_write(size_t byte, size_t bytes, const char* array, int64_t index) {
    const Access now = access_now();
    for (size_t i = byte / 2; i < (byte + bytes) / 2; i++) {
        Shadow& cell = shadow[i];
        if (is_race(cell.writer, now)) race(array, index, cell.writer, true, true);
        for (const Access& reader : cell.readers)
            if (is_race(reader, now)) race(array, index, reader, false, true);
        cell.writer = now;
    }
}

}  // namespace cpu

template <typename T>
class Shared {
public:
    // One element: reading it and assigning to it are told apart.  It cannot be kept, as `auto`
    // would: it would be read when it is used, and not here.
    class Element {
    public:
        Element(const Shared& array, int64_t index) : array_(array), index_(index) {}
        operator T() const&& {
            const size_t byte = array_.byte(index_);
            cpu::note_read(byte, sizeof(T), array_.name_, index_);
            T value;
            memcpy(&value, reinterpret_cast<char*>(cpu::gpu.shared.data()) + byte, sizeof(T));
            return value;
        }
        void operator=(T value) const&& {
            const size_t byte = array_.byte(index_);
            cpu::note_write(byte, sizeof(T), array_.name_, index_);
            memcpy(reinterpret_cast<char*>(cpu::gpu.shared.data()) + byte, &value, sizeof(T));
        }
        void operator=(const Element& other) const&& { array_[index_] = T(other.array_[other.index_]); }
        void operator+=(T value) const&& { array_[index_] = T(array_[index_]) + value; }

    private:
        Shared array_;
        int64_t index_;
    };

    Shared(size_t begin, int64_t size, const char* name)
        : begin_(begin), size_(size), name_(name) {}
    Element operator[](int64_t index) const { return Element(*this, index); }
    Shared operator+(int64_t count) const {
        return Shared(begin_ + count * sizeof(T), size_ - count, name_);
    }

    // Where an element lies in the shared memory of the thread block.
    size_t byte(int64_t index) const {
        if (index < 0 || index >= size_) cpu::out_of_bounds(name_, index, size_);
        return begin_ + index * sizeof(T);
    }

private:
    size_t begin_;
    int64_t size_;
    const char* name_;
};

#endif

namespace cpu {

// Where the chunk of `count` elements from `index` on lies.
template <typename Chunk, typename T>
Chunk* aligned(Global<T> array, int64_t index, int64_t count) {
#ifdef UNCHECKED
    T* begin = array + index;
#else
    T* begin = array.range(index, count);
    if (reinterpret_cast<uintptr_t>(begin) % alignof(Chunk))
        fail("a load or store of " + std::to_string(sizeof(Chunk)) + " bytes at " +
             std::string(array.name()) + "[" + std::to_string(index) + "] is not aligned to them");
#endif
    return reinterpret_cast<Chunk*>(begin);
}

}  // namespace cpu

// Hands out the dynamic shared memory of a thread block, from its beginning, array by array.
class SharedMemory {
public:
    template <typename T>
    Shared<T> array(int64_t count, const char* name) {
        const size_t begin = used_;
        used_ += (count * sizeof(T) + 31) / 32 * 32;
        if (used_ > cpu::gpu.shared_bytes)
            cpu::fail("the shared array " + std::string(name) + " ends at byte " +
                      std::to_string(used_) + ", but the launch asked for " +
                      std::to_string(cpu::gpu.shared_bytes) + " bytes of shared memory");
#ifdef UNCHECKED
        return reinterpret_cast<T*>(reinterpret_cast<char*>(cpu::gpu.shared.data()) + begin);
#else
        if (cpu::shadow.size() < used_ / 2) cpu::shadow.resize(used_ / 2);
        return Shared<T>(begin, count, name);
#endif
    }

private:
    size_t used_ = 0;
};
