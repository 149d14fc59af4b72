// The one-way row move of a mask change, for all cache tensors in one launch.
//
// A cache tensor is [rows, heads, length, row_bytes]; row r belongs to image r modulo `images`. For every slot s >= first
// whose partner is another slot, the row of slot s becomes that of its partner, which lies below `first`: what is read is
// never written, so no order is needed. One warp moves one slot of one tensor and row: its lanes share out the heads' bytes.
//
// grid  x: slots from `first` on, warps_per_block of them to a block; y: cache tensors; z: rows
// block x: 32 * warps_per_block threads

struct CacheTensor {
    uint4* base;             // 16 bytes are moved at a time; row_bytes is a multiple of them
    long long length;        // rows of a head
    long long text_rows;     // how many of them stand before slot 0
};

extern "C" __global__ void move_rows(const CacheTensor* tensors, const long long* partner, int images, int slots, int first,
                                     int heads, int units_per_row)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slot = first + blockIdx.x * (blockDim.x / 32) + warp;
    if (slot >= slots) return;
    const int row = blockIdx.z;
    const long long source = partner[(long long)(row % images) * slots + slot];
    if (source == slot) return;

    const CacheTensor tensor = tensors[blockIdx.y];
    const long long head_units = tensor.length * units_per_row;
    uint4* base = tensor.base + (long long)row * heads * head_units;
    const uint4* from = base + (tensor.text_rows + source) * units_per_row;
    uint4* to = base + (tensor.text_rows + slot) * units_per_row;
    for (int unit = lane; unit < heads * units_per_row; unit += 32) {
        const long long at = unit / units_per_row * head_units + unit % units_per_row;
        to[at] = from[at];
    }
}
