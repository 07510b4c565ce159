// Metal's keywords as C++. After this, only shaders may follow.
#define device
#define constant const
#define thread
#define threadgroup
#define kernel static
