//! The scripts for both losetups.

use super::script::Script;

const fn script(name: &'static str, lines: &'static str) -> Script {
    Script { name, lines }
}

/// Scripts that use only their own devices.
pub const SCRIPTS: &[Script] = &[
    script(
        "what getopt refuses",
        "
        -x
        -d$A
        -ax
        --foo
        --i
        --l
        --r
        --s
        --d
        --a
        --n
        --o
        --out
        --det $A
        --no
        --off
        -o
        --offset
        -j
        -b
        --sector-size
        -O
        --output
        --loop-ref
        --sizelimit
        --all=3
        --raw=x
        --show= -f
        --detach=$A
        --set-capacity=$A
        --remove=$A
        -s
        ",
    ),
    script(
        "two modes at once",
        "
        -a -d $A
        -d $A -D
        -f -a
        -D -f
        -D -c $A
        -l -f
        -l -D
        -l -d $A
        -l -c $A
        -O NAME -d $A
        -O NAME -f
        -f a.img -O NAME
        -f a.img -l
        -f a.img -j a.img
        -f a.img -d $A
        -f -c $A
        -c $A -f
        -d $A -c $A
        -j a.img -a
        -j a.img -d $A
        -a -j a.img
        --json --raw
        --raw -J -l
        -d -f
        --remove $A -d $A
        --remove $A -f
        --remove -l $A
        --remove -O NAME $A
        --remove -a
        --remove -j a.img
        --remove -D
        --remove -c $A
        ",
    ),
    script(
        "what is missing or too much",
        "
        -d
        -c
        --remove
        -n
        -r
        -P
        -L
        --show
        -b 512
        --direct-io
        --loop-ref x
        -o 512
        --sizelimit 512
        -n -J
        -d -n
        -f a.img b.img
        -f -- a.img b.img
        --show -f a.img b.img
        ",
    ),
    script(
        "options that need a setup",
        "
        --show -f
        --show $A
        --show -a
        --show -d $A
        --show -d
        --remove --show $A
        -r $A
        -r -f
        -r -a
        -P -l
        -P $A
        --sizelimit 512 -a
        --sizelimit 512 $A
        --direct-io -j a.img
        --direct-io=on -j a.img
        -o 0 -a
        -o 512 -f
        -o 512 $A
        -o 0 -l
        -o 0 -l $A
        -o 0 -d $A
        -o 0 -c $A
        ",
    ),
    script(
        "numbers that are none",
        "
        -o 1X -f a.img
        -o -1 -f a.img
        -o -1K -f a.img
        --off -1 -f a.img
        -o '' -f a.img
        -o K -f a.img
        -o 1B -f a.img
        -o 1b -f a.img
        -o 1Ki -f a.img
        -o 1KIB -f a.img
        -o '5 ' -f a.img
        -o 5K5 -f a.img
        -o 1.5 -f a.img
        -o 1. -f a.img
        -o .5M -f a.img
        -o 1,5M -f a.img
        -o 08 -f a.img
        -o 0x -f a.img
        -o 1e3 -f a.img
        -o 1.-5K -f a.img
        -o 1Z -f a.img
        -o 16E -f a.img
        -o 20EB -f a.img
        -o 18446744073709551616 -f a.img
        -o=512 -f a.img
        --sizelimit 1X -f a.img
        --sizelimit= -f a.img
        --sizelimit -5 -f a.img
        -b x -f a.img
        -b -1 -f a.img
        --direct-io=maybe -f a.img
        --direct-io= -f a.img
        --direct-io=ON -f a.img
        -o 15E -f a.img
        -o 9223372036854775808 -f a.img
        --sizelimit 9223372036854775808 -f a.img
        -b 1000 -f a.img
        -b 513 -f a.img
        -b 256 -f a.img
        -b 128K -f a.img
        -b 1.5K -f a.img
        ",
    ),
    script(
        "columns that are none",
        "
        -O colour
        -O NAME,colour,RO
        -O colour,NAME
        -O NAME,
        -O ,NAME
        -O NAME,,RO
        -O ''
        -O +
        -O +colour
        -O ++NAME
        -O +NAME,+RO
        -O ' NAME'
        -O NAME:RO
        -J -O colour $A
        ",
    ),
    script(
        "names that are no loop devices",
        "
        /dev/sda
        loop
        loop-control
        /dev/loop-control
        loop4294967296
        nonexistent
        1048575
        ''
        /dev/null
        /etc/passwd
        -d /dev/sda
        -d loop
        -d loop-control
        -d /dev/loop-control
        -d loop4294967296
        -d nonexistent
        -d /dev/null
        -d /etc/passwd
        -d /var/tmp
        -d ''
        -d nonexistent other
        -c /dev/sda
        -c loop
        -c /dev/loop-control
        -c loop4294967296
        -c /dev/null
        -c nonexistent extra
        -b 512 /dev/sda
        -b 512 /dev/null
        --direct-io /dev/null
        --direct-io on
        --remove /dev/sda
        --remove nonexistent
        --remove loop
        --remove /dev/null
        --remove /dev/loop-control
        $C
        -d $C
        -c $C
        -b 512 $C
        --direct-io $C
        -l $C
        --remove $C
        --remove loop99999
        /dev/sda a.img
        loop a.img
        /dev/loop-control a.img
        loop4294967296 a.img
        loop1048576 a.img
        nonexistent a.img
        /dev/null a.img
        /etc/passwd a.img
        /var/tmp a.img
        '' a.img
        a.img b.img
        /dev/loop/3 a.img
        -- -j a.img
        -l nonexistent
        -l /dev/null
        -J -l nonexistent
        --raw -l nonexistent
        -n -l nonexistent
        --output-all -l nonexistent
        -J --output-all -l nonexistent
        -J nonexistent
        ",
    ),
    script(
        "files that cannot be attached",
        "
        -f nonexistent
        -f directory
        -f fifo
        -f /dev/null
        -f ''
        $A nonexistent
        $A directory
        $A ''
        $A fifo
        $A /dev/null
        /dev/null nonexistent
        /dev/null fifo
        /dev/loop-control fifo
        -L -f nonexistent
        -L -f directory
        -L $A nonexistent
        ",
    ),
    script(
        "attach, look and detach",
        "
        $A
        -l $A
        $A a.img
        $A
        -l $A
        -n -l $A
        --raw -l $A
        -n --raw -l $A
        -J -l $A
        --json $A
        --raw $A
        -- $A
        -J --list $A
        -n -J -l $A
        --output-all $A
        -n --output-all $A
        --raw --output-all $A
        -J --output-all $A
        -O name $A
        -O NAME -O RO $A
        -O NAME,NAME $A
        -l -O +REF $A
        -O BACK-MAJ:MIN,MAJ:MIN $A
        -n -O BACK-MAJ:MIN,MAJ:MIN $A
        --raw -n -O NAME,BACK-MAJ:MIN,MAJ:MIN $A
        -O NAME,BACK-INO,BACK-FILE $A
        --output-all -O NAME $A
        --output-all -O +NAME $A
        -j a.img
        -j link.img
        -j ./a.img
        -j $D/a.img
        -j a.img -o 0
        -j a.img -o 512
        -o 0 -j a.img -l
        -j a.img -l
        -j a.img -J -O NAME
        -j a.img -J
        -j b.img
        -j b.img -l
        -j b.img -J -l
        -j nonexistent
        -j directory
        -b 512 -j a.img
        --direct-io=off -j a.img
        --loop-ref x -j a.img
        -L -j a.img
        $A b.img
        $A a.img extra words
        -d $A
        $A
        -l $A
        -J -l $A
        -n -l $A
        --raw -l $A
        --output-all -l $A
        -J --output-all -l $A
        -d $A
        -c $A
        -b 1024 $A
        --direct-io $A
        --direct-io=off $A
        -d $A $B
        -d nonexistent $A
        --remove $A
        $A
        -d $A
        ",
    ),
    script(
        "names of devices",
        "
        $Ax a.img
        $A/ a.img
        --show $A a.img
        -d $A
        $A a.img --show
        /dev/../$A
        -d $A
        /dev//$A a.img
        $A
        -d /dev/../$A
        $A
        ",
    ),
    script(
        "a device that is not there yet",
        "
        --show $C a.img
        $C
        -l $C
        -d $C
        $C
        --remove $C
        $C
        ",
    ),
    script(
        "offsets and sizes",
        "
        -o 1K --sizelimit 4K $A a.img
        $A
        -l $A
        -n -l $A
        -j a.img -o 1024
        -j a.img -o 1K -l
        -j a.img -o 2K
        -d $A
        -o 0x200 $A a.img
        $A
        -d $A
        -o 0x1K $A a.img
        $A
        -d $A
        -o 01000 $A a.img
        $A
        -d $A
        -o 512KB $A a.img
        $A
        -d $A
        -o 1.5K $A a.img
        -O NAME,OFFSET $A
        -d $A
        -o ' +512' $A a.img
        $A
        -d $A
        -o 1kib --sizelimit 64kb $A a.img
        -O OFFSET,SIZELIMIT $A
        -n -O OFFSET,SIZELIMIT $A
        -d $A
        -o 1.75M $A a.img
        -O NAME,OFFSET,RO $A
        --detach $A
        --sizelimit 2M $A a.img
        $A
        -d $A
        --sizelimit 0 $A a.img
        $A
        -d $A
        -o 1M $A a.img
        -O NAME,OFFSET,RO $A
        --detach $A
        -o 2M $A a.img
        -O NAME,OFFSET,RO $A
        --detach $A
        --sizelimit 0.5M -o 0.5M $A a.img
        -J -l $A
        -d $A
        ",
    ),
    script(
        "files that do not end with a sector",
        "
        $A odd.img
        $A
        -d $A
        --sizelimit 1000 $A a.img
        $A
        -d $A
        $A tiny.img
        -l $A
        --detach $A
        $A empty.img
        -J -l $A
        --detach $A
        -o 512 $A odd.img
        --raw -l $A
        --detach $A
        ",
    ),
    script(
        "extents that are not whole sectors",
        "
        --sizelimit 100 $A a.img
        -l $A
        -d $A
        ",
    ),
    script(
        "offsets within a sector",
        "
        -o 100 $A a.img
        -l $A
        -d $A
        -o 1.05K $A a.img
        -l $A
        -d $A
        ",
    ),
    script(
        "how a file is attached",
        "
        -r $A a.img
        -l $A
        -d $A
        -P $A a.img
        -O NAME,PARTSCAN,RO $A
        -J -O NAME,PARTSCAN,RO $A
        -d $A
        -Pr --show $A a.img
        -O NAME,PARTSCAN,RO $A
        -d $A
        -b 4096 $A a.img
        -O NAME,LOG-SEC $A
        -n -O NAME,LOG-SEC $A
        -d $A
        --sector-size 1k $A a.img
        -l $A
        -d $A
        -b 0 $A a.img
        -O LOG-SEC $A
        -d $A
        --direct-io $A a.img
        -O NAME,DIO $A
        -d $A
        --direct-io=off $A a.img
        -O NAME,DIO $A
        -d $A
        --loop-ref mine $A a.img
        -O NAME,REF $A
        -J -O REF $A
        -d $A
        --loop-ref '' $A a.img
        -O NAME,REF $A
        -d $A
        --loop-ref 'a b' $A a.img
        --raw -O REF $A
        -d $A
        --loop-ref 0123456789012345678901234567890123456789012345678901234567890123456789 $A a.img
        -O REF $A
        -d $A
        $A 'sp ace.img'
        $A
        -l $A
        --raw -l $A
        -J -l $A
        -j 'sp ace.img'
        -d $A
        $A 'lösch\tb\\x41.img'
        $A
        -l $A
        --raw -l $A
        -J -l $A
        -O BACK-FILE,NAME $A
        -d $A
        ",
    ),
    script(
        "a free device",
        "
        -f
        -f -f
        -n -f
        -J -f
        --nooverla -f
        --loop-ref x -f
        -b 512 -f
        --output-all -f
        -f --show a.img
        -j a.img
        --show -f a.img
        -j a.img -O NAME,BACK-FILE
        -f b.img
        -j b.img -l
        --find --show 'sp ace.img' -o 512 --sizelimit 1K -r
        -j 'sp ace.img'
        ",
    ),
    script(
        "no overlap",
        "
        $A a.img
        -L -f --show a.img
        -L -f a.img
        -L -f --show link.img
        -L $B a.img
        -L -f -o 512 --show a.img
        -L -f --sizelimit 512K --show a.img
        -L -r -f --show a.img
        -j a.img
        -d $A
        -r $A a.img
        -L -f --show a.img
        -L -r -f --show a.img
        -d $A
        -o 512K $A a.img
        -L --sizelimit 512K $B a.img
        -j a.img
        -d $A $B
        -L $A a.img
        -L -f --show b.img
        -j b.img
        $B b.img
        -j b.img
        ",
    ),
    script(
        "reuse takes a lazy detach back",
        "
        $A a.img
        !open $A
        -d $A
        -O NAME,AUTOCLEAR $A
        -L -f --show a.img
        -O NAME,AUTOCLEAR $A
        !close
        $A
        --detach $A
        $A
        ",
    ),
    script(
        "changes",
        "
        $A a.img
        -b 1024 $A
        -O NAME,LOG-SEC $A
        -b 4K $A
        -O NAME,LOG-SEC $A
        -b 512 $A
        -b 1000 $A
        -b 256 $A
        -O NAME,LOG-SEC $A
        --direct-io $A
        -O NAME,DIO $A
        --direct-io=off $A
        -O NAME,DIO $A
        --direct-io=on $A
        -O NAME,DIO $A
        -b 512 --direct-io=off $A
        -O NAME,DIO,LOG-SEC $A
        -c $A
        -c $A extra
        -d $A
        -r $A a.img
        -c $A
        -b 1024 $A
        -O LOG-SEC $A
        -d $A
        ",
    ),
    script(
        "a file that grows, shrinks and goes",
        "
        $A a.img
        !size 2097152 a.img
        -c $A
        $A
        !size 102400 a.img
        -c $A
        -l $A
        !remove a.img
        $A
        -l $A
        --raw -l $A
        -J -O BACK-FILE $A
        -j a.img
        -j $D/a.img
        -c $A
        -d $A
        $A
        ",
    ),
    script(
        "detaching what is in use",
        "
        $A a.img
        !open $A
        -d $A
        $A
        -O NAME,AUTOCLEAR $A
        --remove $A
        !close
        $A
        ",
    ),
    script(
        "several at once",
        "
        $A a.img
        $B b.img
        -d $A nonexistent $B
        $A
        $B
        $A a.img
        $B a.img
        -j a.img
        -j a.img -l
        -j a.img -J -l
        -n -j a.img -O NAME,OFFSET
        -d $A -d $B
        $A -d
        -d $A $A
        --remove $A $B
        --remove $A nonexistent $B
        ",
    ),
    script(
        "taking nodes away",
        "
        $A a.img
        --remove $A
        -d $A
        !open $A
        --remove $A
        !close
        --remov $A
        --remove $A
        ",
    ),
    script(
        "historic spellings",
        "
        -e aes a.img
        -E 1 a.img
        -k 128 -f a.img
        -N -f a.img
        -p 0 -f a.img
        --encryption aes a.img
        --pass-fd 0 a.img
        -v -j a.img
        -vj a.img
        --verbose -j a.img
        ",
    ),
    script(
        "a block size that no number of 32 bits holds",
        "
        -b 4294968320 $A a.img
        -O LOG-SEC $A
        -d $A
        ",
    ),
];

/// A script whose answers depend on the rights to files.
pub const ROOTS: &[Script] = &[script(
    "a file that only root may write to",
    "$A read-only.img\n-l $A\n-d $A\n-r $A secret.img\n-l $A\n-d $A",
)];

/// Scripts that list or detach all loop devices of the machine: only if the machine has no others.
pub const WHOLE_MACHINE: &[Script] = &[
    script(
        "listing all",
        "
        -a
        -l

        -J
        --raw
        -J -a
        $A a.img
        -r -o 512 $B b.img
        -f 'sp ace.img'
        -a
        -a whatever it is
        --all
        -l
        -la
        -nl
        -l -O NAME
        --raw
        -J
        -J -a
        --raw -a
        -J --list
        --json --output NAME,RO
        -O NAME
        --output-all
        -D
        -a
        ",
    ),
    script(
        "detaching all",
        "
        -D
        $A a.img
        $B b.img
        -D extra
        $A
        $B
        --detach-
        ",
    ),
];

/// For `$A` with a.img and `$B` with b.img, attached by util-linux's losetup.
pub const BESIDE_THEIRS: &[Script] = &[
    script(
        "look at theirs",
        "$A\n-l $A\n-J --output-all $A\n-j a.img\n-j a.img -l\n$A b.img\n-L $C a.img\n-L -f --show a.img",
    ),
    script(
        "change theirs",
        "-c $A\n-b 1024 $A\n-O LOG-SEC $A\n-b 512 $A\n--direct-io $A\n-O DIO $A\n--direct-io=off $A\n-O DIO $A",
    ),
    script("detach theirs", "-d $A nonexistent $B\n$A\n-l $B\n-d $A\n$A b.img\n$A"),
];

/// For a user whom polkit denies: `$A` and `$B` belong to root.
pub const DENIED: &[Script] = &[
    script("attach", "-f a.img\n--show -f a.img\n-f read-only.img\n-r -f a.img"),
    script("detach", "-d $A\n-d $A $B"),
    script("change", "-c $A\n-b 1024 $A\n--direct-io $A\n--direct-io=off $A"),
    script("look", "-l $A\n-J -l $A\n--raw -l $A\n-O NAME,RO,BACK-FILE $A\n-j a.img -l\n-j secret.img -l"),
    script("misspell", "-x\n-o 1X -f a.img\n-f a.img b.img"),
];
